"""Replies from a run directory alone: streamed, reproducible, and on a terminal as somebody types."""

from __future__ import annotations

import errno
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moalign
from moalign.engine.replies import Manner, Speaker, _Stream
from moalign.errors import ModelError, UserError
from moalign.seeds import derive

MIDDLE = "w-0.50-0.50"


@pytest.fixture(scope="module")
def loaded(small_run):
    return moalign.open_run(small_run).load(helpful=0.7, harmless=0.3)


def speaker(loaded, **manner) -> Speaker:
    model, tokenizer = loaded
    return Speaker(model, tokenizer, Manner(**manner))


# --- replies --------------------------------------------------------------------------------------------------------


def test_a_reply_is_a_function_of_seed_prompt_number_and_sample(loaded):
    before = torch.random.get_rng_state()
    one = speaker(loaded, max_new_tokens=20).reply("q1: ", 2, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert speaker(loaded, max_new_tokens=20).reply("q1: ", 2, 1) == one
    others = [
        speaker(loaded, max_new_tokens=20, seed=s).reply("q1: ", *at)
        for s, at in ((1, (2, 1)), (0, (0, 1)), (0, (2, 0)))
    ]
    assert all(other.text != one.text for other in others)


def test_what_is_streamed_is_the_reply_piece_by_piece(loaded):
    for number in range(5):
        pieces: list[str] = []
        reply = speaker(loaded, max_new_tokens=30).reply("q1: ", number, write=pieces.append)
        assert "".join(pieces) == reply.text
        assert len(pieces) >= reply.tokens - 2  # a letter each here; end and other special tokens have no text


def test_temperature_0_is_the_likeliest_and_small_top_p_too(loaded):
    greedy = speaker(loaded, max_new_tokens=12, temperature=0.0)
    model, tokenizer = loaded
    ids = [1, *tokenizer("q1: ", add_special_tokens=False).input_ids]
    said: list[int] = []
    with torch.no_grad():
        while len(said) < 12 and 2 not in said:
            said.append(int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
    assert greedy.reply("q1: ").text == tokenizer.decode(said, skip_special_tokens=True)
    assert speaker(loaded, max_new_tokens=12, top_p=1e-6).reply("q1: ").text == greedy.reply("q1: ").text


def test_the_sampling_is_of_the_policy_itself(loaded):
    """First letters of 400 replies against the model's own probabilities, whatever its generation settings say."""
    model, tokenizer = loaded
    model.generation_config.temperature, model.generation_config.top_k = 0.1, 1
    ids = torch.tensor([[1, *tokenizer("q1: ", add_special_tokens=False).input_ids]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].softmax(-1)
    talking = speaker(loaded, max_new_tokens=1)
    letters = [talking.reply("q1: ", number).text for number in range(400)]
    counts = torch.zeros_like(expected)
    for letter in letters:
        found = tokenizer(letter, add_special_tokens=False).input_ids if letter else []
        if len(found) == 1:
            counts[found[0]] += 1
    likely = expected > 0.005
    deviation = (counts - 400 * expected).abs() / (400 * expected * (1 - expected)).sqrt()
    assert int(likely.sum()) > 20 and float(deviation[likely].max()) < 5


def test_a_prompt_is_put_as_in_training(loaded, monkeypatch):
    """With a chat template it is a user's message, and the template says what stands first."""
    model, tokenizer = loaded
    asked: list[list[int]] = []
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda **how: asked.append(how["input_ids"][0].tolist()) or real(**how))
    letters = tokenizer("uq;a", add_special_tokens=False).input_ids
    Speaker(model, tokenizer, Manner(1)).reply("uq;a")
    turns = "{% for message in messages %}u{{ message.content }};{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", turns + "{% if add_generation_prompt %}a{% endif %}")
    Speaker(model, tokenizer, Manner(1)).reply("q")
    assert asked == [[tokenizer.bos_token_id, *letters], letters]


def test_room_in_the_context_is_counted(loaded):
    talking = speaker(loaded, temperature=0.0)
    assert talking.reply("q" * 250).tokens <= 5  # 256 in all, with the first token
    with pytest.raises(ModelError, match=r"251 tokens and the model takes 256 in all, which leaves 5 .*, not 6"):
        speaker(loaded, max_new_tokens=6).reply("q" * 250)
    with pytest.raises(ModelError, match="leaves 0"):
        talking.reply("q" * 300)


@pytest.mark.parametrize(
    "manner",
    [
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": -1.0},
        {"temperature": 1e-300},
        {"temperature": float("inf")},
        {"temperature": math.nan},
    ],
)
def test_a_manner_that_means_nothing_is_refused(manner):
    with pytest.raises(UserError, match="temperature is 0 or from 1e-06 up"):
        Manner(**manner)


# --- the command ----------------------------------------------------------------------------------------------------


def generate(run: Path, *arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return command_line.moalign("generate", run, *arguments, stdin=stdin)


def test_between_two_points_from_the_run_directory_alone(small_run, loaded):
    """Its data file is gone (see the fixture); stdout has the reply and nothing else."""
    done = generate(small_run, "--prefer", "helpful=0.7,harmless=0.3", "--prompt", "q1: ", "--max-new-tokens", 20)
    assert done.returncode == 0, done.stderr
    assert done.stdout == speaker(loaded, max_new_tokens=20).reply("q1: ").text + "\n"
    assert f"harmless=0.3, helpful=0.7: 0.4 of w-0.00-1.00 + 0.6 of {MIDDLE}" in done.stderr
    assert "loading the model" in done.stderr and "\x1b" not in done.stdout + done.stderr


def test_lines_of_stdin_are_prompts_and_json_has_a_line_for_each_reply(small_run, loaded):
    prompts = "q1: \n\nq2:\n"  # the run's prompts end in a space, which an editor may have cut off
    done = generate(small_run, "--prefer", "helpful=0.7,harmless=0.3", "--samples", 2, "--json", stdin=prompts)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [("q1: ", 0), ("q1: ", 1), ("q2: ", 0), ("q2: ", 1)]
    assert "the run's prompts end in ' ', which is added to lines without it" in done.stderr
    for number, row in enumerate(rows):
        reply = speaker(loaded).reply(row["prompt"], number // 2, row["sample"])
        assert (row["response"], row["tokens"], row["ended"]) == (reply.text, reply.tokens, reply.ended)
        assert row["adapters"] == pytest.approx({"w-0.00-1.00": 0.4, MIDDLE: 0.6})


def test_a_decoder_speaks_in_the_place_of_a_mix(small_run):
    """What ``Run.decoder`` says with the same seed; streamed and as JSON."""
    prefer, seed = "helpful=0.7,harmless=0.3", derive(3, "generate", 0, 0)
    decoding = moalign.open_run(small_run).decoder("multi-objective", prefer=prefer)
    (said,) = decoding.generate(["q1: "], max_new_tokens=12, seed=seed)
    how = ("--prefer", prefer, "--decoder", "multi-objective", "--seed", 3, "--max-new-tokens", 12)
    done = generate(small_run, *how, "--prompt", "q1: ")
    assert done.returncode == 0 and done.stdout == said.text + "\n", done.stderr
    assert "the decoder multi-objective" in done.stderr
    done = generate(small_run, *how, "--json", stdin="q1: \n")
    row = json.loads(done.stdout)
    assert (row["response"], row["tokens"], row["decoder"]) == (said.text, len(said.ids), "multi-objective")
    assert "adapters" not in row


@pytest.mark.parametrize(
    ("setting", "message"),
    [("m=4", "decoder best-of-n.m: unknown key; known: candidate, n"), ("n", "--set n: write it as key=value")],
)
def test_a_decoders_options_are_checked(small_run, setting, message):
    done = generate(small_run, "--prefer", "equal", "--decoder", "best-of-n", "--set", setting, "--prompt", "q")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --prefer or --candidate"),
        (("--candidate", "w-9"), f"there are w-1.00-0.00, w-0.00-1.00, {MIDDLE}"),
        (("--prefer", "helpful=0.7,harmles=0.3"), "did you mean 'harmless'?"),
        (("--prefer", "equal", "--top-p", "2"), "'--top-p'"),
        (("--prefer", "equal", "--top-p", "0"), "top-p lies above 0"),
        (("--prefer", "equal", "--set", "n=4"), "--set: these are a decoder's options; name one with --decoder"),
        (("--candidate", MIDDLE, "--decoder", "best-of-n"), "--decoder: give --prefer"),
        (("--prefer", "equal", "--decoder", "best-of-n", "--top-p", "0.5"), "--top-p: a decoder says itself"),
        (("--prefer", "equal", "--decoder", "best-of-n", "--rank", "1"), "--rank: a decoder hears"),
    ],
)
def test_what_cannot_be_had_is_refused_with_2(small_run, arguments, message):
    done = generate(small_run, *arguments, "--prompt", "q")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert "loading" not in done.stderr


# --- on a terminal --------------------------------------------------------------------------------------------------

SLOWLY = """
import sys, time
from moalign import cli
from moalign.engine import replies
put = replies._Stream.put
def slow(self, value):
    time.sleep(0.05)
    put(self, value)
replies._Stream.put = slow
sys.argv = ["moalign", "generate", *sys.argv[1:]]
cli.main()
"""


class Terminal:
    """A person at the keyboard: types, and reads what stands on the screen."""

    def __init__(self, *arguments: object):
        self.child, self._screen = pty.fork()
        if self.child == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background processes are to ignore it
            os.execv(sys.executable, [sys.executable, "-c", SLOWLY, *map(str, arguments)])
        self.seen, self._read = "", 0

    def read_until(self, pattern: str, seconds: float = 90.0) -> None:
        """Read on until the pattern appears behind what was read before."""
        until = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.seen, self._read)):
            ready, _, _ = select.select([self._screen], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"{pattern!r} did not appear: {self.seen!r}"
            try:
                data = os.read(self._screen, 4096)
            except OSError as error:  # Linux says so where the other side is closed
                assert error.errno == errno.EIO
                data = b""
            assert data, f"ended before {pattern!r} appeared: {self.seen!r}"
            self.seen += data.decode(errors="replace")
        self._read = found.end()

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def end(self) -> int:
        try:
            while os.read(self._screen, 4096):
                pass
        except OSError:
            pass
        _, status = os.waitpid(self.child, 0)
        os.close(self._screen)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def terminal(small_run):
    person = Terminal(small_run, "--candidate", MIDDLE, "--temperature", "0")
    person.read_until("> ")
    return person


def stop(terminal: Terminal, line: str) -> None:
    """Ctrl-C in the middle of a reply. On a busy machine it may come when the reply is over; then once more."""
    for _ in range(10):
        terminal.type(f"{line}\n")
        terminal.read_until(rf"{line}\r?\n[^\r\n]")  # the first letter of the reply, long before the last
        terminal.type("\x03")
        with suppress(AssertionError):
            terminal.read_until("stopped", seconds=5.0)
            return terminal.read_until("> ")
    raise AssertionError(f"no reply was stopped: {terminal.seen!r}")


def interrupt_at_the_prompt(terminal: Terminal) -> None:
    """Ctrl-C with nothing to stop. Python hears one between its last look and its read with the next key only."""
    for _ in range(10):
        terminal.type("\x03")
        with suppress(AssertionError):
            terminal.read_until("Ctrl-D ends", seconds=5.0)
            return terminal.read_until("> ")
    raise AssertionError(f"nothing was said: {terminal.seen!r}")


def test_a_conversation_ctrl_c_stops_a_reply_and_an_empty_line_ends(terminal):
    stop(terminal, "q1: ")
    interrupt_at_the_prompt(terminal)
    stop(terminal, "q2: ")
    terminal.type("q" * 300 + "\n")
    terminal.read_until("leaves 0[^>]*> ")  # an answer, not an end
    terminal.type("\n")
    assert terminal.end() == 0


def test_ctrl_d_ends(terminal):
    terminal.type("\x04")
    assert terminal.end() == 0


def test_sigterm_ends_also_in_the_middle_of_a_reply(terminal):
    terminal.type("q1: \n")
    terminal.read_until(r"q1: \r?\n[^\r\n]")
    os.kill(terminal.child, signal.SIGTERM)
    assert terminal.end() == 130


def test_what_would_steer_a_terminal_is_shown_and_not_done(monkeypatch, capsys):
    from moalign.commands import generate as command

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    command._written("a\x1b[2J\rb\n\tc")
    assert capsys.readouterr().out == "a�[2J�b\n\tc"


def test_a_letter_of_several_tokens_is_shown_when_it_is_whole():
    """Byte-level tokens: no half letters on the screen."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: k for k, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "naïve, 日本\nend 🙂."
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    pieces: list[str] = []
    stream = _Stream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for each in ids:
        stream.put(torch.tensor([each]))
    stream.end()
    assert "".join(pieces) == text and len(pieces) == len(text)


def test_a_prompt_that_is_not_utf_8_is_named_before_anybody_answers():
    from moalign.commands.generate import _answer

    unasked: Any = None
    with pytest.raises(UserError, match="prompt 1: its character 4 is not UTF-8"):
        _answer(unasked, {}, ["caf\udce9"], 1, False)

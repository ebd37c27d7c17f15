"""``moalign generate``: responses of any point of the front, or between its points, while they are written."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from moalign.commands import steered
from moalign.commands.steered import Base, Candidate, Posterior, Prefer, Rank, Run
from moalign.errors import ConfigError, MoalignError, PreferenceError

if TYPE_CHECKING:
    from moalign.commands.decoded import Decoded
    from moalign.engine.replies import Speaker

    Talking = Speaker | Decoded

About = Mapping[str, Any]  # who speaks, for JSON

INTERRUPTED = 130


def generate(
    run_directory: Run,
    prefer: Prefer = None,
    candidate: Candidate = None,
    posterior: Posterior = None,
    draw: steered.Seed = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Answer this, as it stands, and end; default: ask, or read stdin line by line."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses to each prompt.")] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a response; default 256 (a decoder: 128), or what there is room for."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="1 is the policy that was trained and scored; 0 takes the likeliest token.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="A response is a function of it, of the prompt and of their number.")] = 0,
    decoder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Let a decoder speak (moalign plugins list --kind decoder)."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the decoder, e.g. n=8.")
    ] = None,
    rank: Rank = None,
    base: Base = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda; default: an accelerator if there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each response.")] = False,
) -> None:
    """Talk to a point of the front, or to a preference between the trained ones.

    Each prompt stands for itself: there is no memory of the one before. Needs the run directory and the base model.
    """
    _check_decoder(decoder, settings, prefer, rank, posterior, top_p)
    archive, mix = steered.chosen(run_directory, prefer, candidate, posterior, draw)
    from moalign.engine.replies import Manner, Speaker
    from moalign.sweeps import steering

    manner = Manner(max_new_tokens, temperature, top_p, seed)
    steered.phase("loading the model")
    speaker: Talking
    if decoder is not None:
        from moalign.commands import decoded

        speaker = decoded.opened(
            archive, decoder, settings or (), prefer or "", manner, base, device or steered.device()
        )
        steered.note(f"the decoder {decoder}")
    else:
        model, tokenizer = steering.load(archive, mix, base=base, r=rank, device=device or steered.device())
        steered.say(mix)
        text = steering.text(archive, mix)
        if text:
            steered.note(f"in front of every prompt: {text!r}")
        vectors = steering.vectors(archive, mix)
        if vectors is not None:
            steered.note(f"in front of every prompt: {len(vectors)} virtual tokens")
        speaker = Speaker(model, tokenizer, manner, text, vectors)
    about: About = {"adapters": dict(mix.shares)} if decoder is None else {"decoder": decoder}
    if mix.draw is not None:
        about = {**about, "posterior": mix.draw.mass, "draw": mix.draw.seed}
    signal.signal(signal.SIGTERM, _leave)  # else it would pass for Ctrl-C, which ends a response and not the command
    if prompt is not None:
        _answer(speaker, about, [prompt], samples, as_json)
        return
    ending = "" if speaker.has_template else steering.ending_of_prompts(archive, mix)
    if ending:
        steered.note(f"the run's prompts end in {ending!r}, which is added to lines without it")
    if sys.stdin.isatty():
        _converse(speaker, about, ending, samples, as_json)
    else:
        lines = (line.rstrip("\n") for line in sys.stdin if line.strip())
        _answer(speaker, about, (_ended(line, ending) for line in lines), samples, as_json)


def _check_decoder(
    decoder: str | None,
    settings: list[str] | None,
    prefer: str | None,
    rank: int | None,
    posterior: float | None,
    top_p: float,
) -> None:
    if decoder is None:
        if settings:
            raise ConfigError("--set: these are a decoder's options; name one with --decoder")
    elif prefer is None:
        raise PreferenceError("--decoder: give --prefer, which says what it is to serve")
    elif rank is not None:
        raise ConfigError("--rank: a decoder hears the candidates' adapters as they are; leave it out")
    elif posterior is not None:
        raise ConfigError("--posterior: a decoder hears the candidates' adapters as they were trained; leave it out")
    elif top_p != 1:
        raise ConfigError("--top-p: a decoder says itself which tokens may come; leave it out")


def _leave(signum: int, frame: Any) -> NoReturn:
    sys.exit(INTERRUPTED)


def _ended(line: str, ending: str) -> str:
    return line if line.endswith(ending) else line + ending


def _answer(speaker: Talking, about: About, prompts: Any, samples: int, as_json: bool) -> None:
    for number, prompt in enumerate(prompts):
        _respond(speaker, about, prompt, number, samples, as_json)


def _converse(speaker: Talking, about: About, ending: str, samples: int, as_json: bool) -> None:
    """Prompts from the terminal until one is empty. Ctrl-C ends the response under way."""
    console = steered.console()
    console.print("[dim]an empty line or Ctrl-D ends, Ctrl-C stops a response[/]", highlight=False)
    for number, prompt in enumerate(_typed(console)):
        try:
            _respond(speaker, about, _ended(prompt, ending), number, samples, as_json)
        except KeyboardInterrupt:
            console.print("\n[dim]stopped[/]", highlight=False)
        except MoalignError as error:  # such as a prompt that is too long
            console.print(str(error), highlight=False, markup=False)


def _typed(console: Console) -> Iterator[str]:
    while True:
        try:
            prompt = console.input("[bold]> [/]")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n[dim]an empty line or Ctrl-D ends[/]", highlight=False)
            continue
        if not prompt.strip():
            return
        yield prompt


def _respond(speaker: Talking, about: About, prompt: str, number: int, samples: int, as_json: bool) -> None:
    """All responses to one prompt, written as they come, or each as a line of JSON."""
    if (place := next((place for place, each in enumerate(prompt) if "\ud800" <= each <= "\udfff"), None)) is not None:
        raise ConfigError(f"prompt {number + 1}: its character {place + 1} is not UTF-8; give it in that encoding")
    for sample in range(samples):
        if as_json:
            reply = speaker.reply(prompt, number, sample)
            row = {"prompt": prompt, "response": reply.text, "ended": reply.ended, "tokens": reply.tokens}
            row |= {"sample": sample, **about}
            print(json.dumps(row), flush=True)
            continue
        if samples > 1:
            steered.phase(f"{sample + 1} of {samples}")
        speaker.stream(prompt, number, sample, _written)
        print(flush=True)


def _written(text: str) -> None:
    """Onto stdout at once; what would steer a terminal is shown as a replacement character there."""
    if sys.stdout.isatty():
        text = "".join(each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in text)
    sys.stdout.write(text)
    sys.stdout.flush()

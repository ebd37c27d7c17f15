"""PIT: prompts that hold an answer and are taken apart again, and the reward of bettering it, against plain rewards."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError
from sweeps import contents, steps_on_the_assistant
from tabular import SPEECH, on_policy
from test_data_readers import assistant, only, read, refusal, user
from transformers import AutoTokenizer

from moalign import registry
from moalign.api import DataError, PluginError, Reward, Sample
from moalign.config.sections import BUILT_IN_DIRECTORY
from moalign.data.tokenise import Tokeniser
from moalign.demo.grammar import PROMPTS, replies, score
from moalign.errors import ConfigError, UnknownPluginError
from moalign.testing import check_reward
from moalign_plugins._improvement import Template
from moalign_plugins.objectives.grpo import GRPO
from moalign_plugins.objectives.reinforce import REINFORCE
from moalign_plugins.objectives.rloo import RLOO
from moalign_plugins.readers.improvement import Improvements
from moalign_plugins.rewards.improvement import Improvement
from moalign_plugins.rewards.length import Length

ROW = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
TALK = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"})


class Asked(Reward):
    """``worth`` of the response; abstains where it has none. Keeps what it was asked, and counts."""

    worth: dict[str, float]
    questions: list[Sample] = Field(default_factory=list)

    def score(self, samples):
        self.questions.extend(samples)
        return [self.worth.get(sample.response) for sample in samples]


# --- the template ---------------------------------------------------------------------------------------------------

FEW = st.text("ab\n", max_size=6)
MARK = st.text("ab\n", min_size=1, max_size=3)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": FEW}), min_size=1)


@given(FEW, FEW, MARK, MARK)
def test_a_text_is_taken_apart_as_it_was_put_together_or_is_refused(prompt, answer, between, after):
    """With letters so few that all three overlap wherever they can."""
    template = Template(between=between, after=after)
    try:
        asked = template.asked(prompt, answer)
    except ValueError as reason:
        assert repr(between) in str(reason) and "between" in str(reason)
        assert between in (prompt + between + answer)[len(prompt) + 1 :]
    else:
        assert asked == prompt + between + answer + after
        assert template.taken_apart(asked) == (prompt, answer)


@given(FEW, MARK, MARK)
def test_any_text_that_can_be_taken_apart_is_put_together_again(text, between, after):
    template = Template(between=between, after=after)
    try:
        parts = template.taken_apart(text)
    except ValueError as reason:
        assert repr(between) in str(reason) and repr(after) in str(reason)
    else:
        assert template.asked(*parts) == text


@given(MESSAGES, FEW, MARK)
def test_a_conversation_is_always_taken_apart(messages, answer, ask):
    template = Template(ask=ask)
    asked = template.asked(tuple(messages), answer)
    assert template.taken_apart(asked) == (tuple(messages), answer)
    assert template.taken_apart(template.asked(asked, "again")) == (asked, "again")
    with pytest.raises(ValueError, match=r"does not end with .* ask \("):
        template.taken_apart((*asked, assistant("so")))


@given(st.text(), st.text())
def test_the_default_holds_all_texts_but_its_own_marks(prompt, answer):
    template = Template()
    assert template.taken_apart(template.asked(prompt, answer)) == (prompt, answer)


@pytest.mark.parametrize("asked", [(), (user("Q"),), (assistant("A"), user(Template().ask)), ""])
def test_what_is_too_short_to_hold_an_answer(asked):
    with pytest.raises(ValueError, match="the prompt holds no answer to better"):
        Template().taken_apart(asked)


def test_the_tiny_assistant_reads_it_to_the_last_letter_and_has_room_to_answer():
    tokeniser = Tokeniser.of(AutoTokenizer.from_pretrained(BUILT_IN_DIRECTORY / "tiny-assistant"))
    for prompt in PROMPTS:
        longest = max(replies(prompt), key=lambda reply: len(tokeniser.text(reply)))
        asked = Template().asked(prompt, longest)
        ids = tokeniser.prompt(asked)
        assert tokeniser.decoded(ids) == asked
        assert len(ids) + len(tokeniser.text(longest)) < 128


# --- the reward -----------------------------------------------------------------------------------------------------


def asked(answer, response, prompt="Q"):
    return Sample(Template().asked(prompt, answer), response)


def test_it_is_the_difference_of_what_the_other_reward_says():
    worth = {"low": 0.1, "middle": 0.3, "high": 0.7}
    reward = Improvement(reward=Asked(worth=worth))
    for first, second in ((a, b) for a in worth for b in worth):
        (one, other) = reward.score([asked(first, second), asked(second, first)])
        assert one == worth[second] - worth[first] == -other  # antisymmetric to the last bit


def test_the_other_reward_is_asked_about_the_question_alone_and_once_about_each_answer():
    inner = Asked(worth={"a": 1.0, "b": 2.0, "c": 4.0})
    samples = [asked("a", "b"), asked("a", "c"), asked("a", "a"), asked("b", "a", TALK)]
    assert Improvement(reward=inner).score(samples) == [1.0, 3.0, 0.0, -1.0]
    assert inner.questions == [*(Sample("Q", each) for each in "bac"), *(Sample(TALK, each) for each in "ab")]
    assert Improvement(reward=inner).score([]) == []


def test_it_abstains_where_either_score_is_unknown():
    reward = Improvement(reward=Asked(worth={"a": 1.0}))
    assert reward.score([asked("a", "a"), asked("a", "?"), asked("?", "a")]) == [0.0, None, None]


def test_gaps_are_what_the_other_reward_says_of_both_texts():
    after = Template().after
    inner = Asked(worth={f"bad{after}good": 0.8, f"good{after}good": 0.1})
    reward = Improvement(reward=inner, gap=True)
    samples = [asked("bad", "good"), asked("good", "good"), asked("good", "bad"), asked("bad", " ")]
    assert reward.score(samples) == [0.8, 0.1, None, None]
    assert inner.questions == [
        Sample("Q", f"{y_ref}{after}{y}") for y_ref, y in (("bad", "good"), ("good", "good"), ("good", "bad"))
    ]


def test_it_takes_after_the_other_reward():
    class Later(Length):
        deterministic = False

        async def score(self, samples):
            await asyncio.sleep(0)
            return super().score(samples)

        def pessimistic(self):
            return True

    own, later = Improvement(reward=Length()), Improvement(reward=Later())
    assert (own.deterministic, own.pessimistic()) == (True, False)
    assert (later.deterministic, later.pessimistic()) == (False, True)
    samples = [asked("one two", "one"), asked("one", "one two three")]
    assert asyncio.run(later.score(samples)) == own.score(samples) == [1.0, -2.0]
    for reward in (own, later):
        check_reward(reward, samples=[*samples, Sample(Template().asked(TALK, "a b"), "c")])


def test_a_prompt_without_an_answer_and_a_wrong_count_are_refused():
    with pytest.raises(DataError, match=r"holds no answer to better: it is not prompt, between .*reader `improvement`"):
        Improvement(reward=Length()).score([Sample("Q", "A")])
    with pytest.raises(DataError, match=r"does not end with .* ask .*the same between, after and ask"):
        Improvement(reward=Length(), ask="More.").score([Sample(Template().asked(TALK, "A"), "B")])

    class Short(Length):
        def score(self, samples):
            return super().score(samples)[1:]

    with pytest.raises(PluginError, match="reward: it returned 1 scores for 2 samples"):
        Improvement(reward=Short()).score([asked("a", "b")])


# --- an antisymmetric gap is RLHF with a baseline -------------------------------------------------------------------


def signals(drawn, references):
    """What ``Length`` says of texts of these numbers of words, and by how much they better the prompts' answers."""
    texts = {number: " ".join("w" * number) for number in {*drawn, *references}}
    plain = Length().score([Sample("Q", texts[number]) for number in drawn])
    gaps = Improvement(reward=Length()).score(
        [asked(texts[y], texts[x]) for x, y in zip(drawn, references, strict=True)]
    )
    return torch.tensor(plain, dtype=torch.float64), torch.tensor(gaps, dtype=torch.float64)


@pytest.mark.parametrize("objective", [RLOO(), GRPO(), GRPO(standardise=False), RLOO(beta=0.5)])
def test_advantages_within_a_prompt_are_those_of_the_reward_itself(objective):
    """Exactly: whole numbers of which four make a group, so that their mean is exact."""
    plain, gaps = signals([3, 1, 4, 1, 5, 9, 2, 6], [2] * 4 + [7] * 4)
    groups, ratios = torch.tensor([0] * 4 + [1] * 4), torch.zeros(8, dtype=torch.float64)
    assert not torch.equal(plain, gaps)
    found = objective.advantages(gaps, groups, ratios)
    assert torch.equal(found, objective.advantages(plain, groups, ratios)) and found.abs().max() > 0.1


@pytest.mark.parametrize("size", [1, 2])
def test_the_expected_gradient_of_reinforce_is_that_of_the_reward_itself(size):
    """By enumeration, without any baseline of the loss's own: r(y_ref) is one, which only the variance sees."""
    plain, gaps = signals([3, 1, 4, 1, 5, 9], [4] * 6)
    world = on_policy(SPEECH, rewards=plain)
    objective = REINFORCE(baseline="none", beta=0.0)
    expected, found = (replace(world, rewards=each).expected_gradient(objective, size) for each in (plain, gaps))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # sums of some 40 float64 of size 10
    torch.testing.assert_close(found, -world.gradient(world.reward()), rtol=0, atol=1e-12)
    one = torch.tensor([[0]])
    assert not torch.equal(*(replace(world, rewards=each).losses(objective, one) for each in (plain, gaps)))


# --- the reader -----------------------------------------------------------------------------------------------------


def test_a_preference_row_is_an_answer_and_a_better_one():
    record = only(Improvements(), ROW | {"objective": "kind", "strength": 2, "score_chosen": 3}, ["kind"])
    assert record.prompt == "Q\nAnswer:\nbad\nBetter answer:\n" and record.responses == ("good", "bad")
    ((pair,),) = record.pairs.values()
    assert (pair.chosen, pair.rejected, pair.strength) == (0, 1, 2.0) and record.scores == {"kind": (3.0, None)}
    talk = {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    record = only(Improvements(), talk)
    assert record.prompt == (user("Q"), assistant("bad"), user("Give a better answer."))
    assert record.responses == ("good", "bad") and Template().taken_apart(record.prompt) == ((user("Q"),), "bad")


def test_the_chosen_answer_is_asked_for_on_its_own_and_both_are_of_one_group():
    first, second = read(Improvements(better="both"), [ROW])
    assert [Template().taken_apart(each.prompt)[1] for each in (first, second)] == ["bad", "good"]
    assert first.pairs and second.responses == () and not second.pairs and not second.scores
    assert first.group == second.group == "Q"


def test_answers_of_a_policy_are_prompts_and_the_next_round_has_them_replaced():
    rows = [{"prompt": "Q", "responses": ["first", "other"]}, {"prompt": [user("Q")], "response": "first"}]
    found = read(Improvements(), rows)
    assert [Template().taken_apart(each.prompt) for each in found] == [
        ("Q", "first"),
        ("Q", "other"),
        ((user("Q"),), "first"),
    ]
    again = only(Improvements(), {"prompt": found[0].prompt, "response": "second", "ended": True, "tokens": 3})
    assert Template().taken_apart(again.prompt) == ("Q", "second") and again.group == found[0].group


def test_gaps_are_compared_in_both_places():
    record = only(Improvements(gaps=True), ROW | {"strength": 0.5})
    after = Template().after
    named = {f"{y_ref}{after}{y}": (y, y_ref) for y in ("good", "bad") for y_ref in ("good", "bad")}
    g = [named[response] for response in record.responses]
    ((pairs),) = record.pairs.values()
    w, l = "good", "bad"  # noqa: E741
    expected = {((w, l), (w, w)), ((w, l), (l, l)), ((w, l), (l, w)), ((w, w), (l, w)), ((l, l), (l, w))}
    assert {(g[pair.chosen], g[pair.rejected]) for pair in pairs} == expected and len(pairs) == 5
    assert record.prompt == record.group == "Q" and {pair.strength for pair in pairs} == {0.5}
    worth = {w: 0.75, l: -0.5}
    gaps = [worth[y] - worth[y_ref] for y, y_ref in g]
    assert all(gaps[pair.chosen] > gaps[pair.rejected] for pair in pairs)
    # so that the sum of squares which `centre` of bradley-terry makes small has its minimum where g(y, y) is 0
    assert sum(gaps[pair.chosen] + gaps[pair.rejected] for pair in pairs) == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ROW | {"rejected": "bad\nAnswer:\nworse"}, r"the answer holds what separates it .*: between is '\nAnswer:\n'"),
        (ROW | {"rejected": " "}, "the answer that is to be bettered is blank"),
        (ROW | {"rejected": [assistant("bad")]}, "one of chosen and rejected is text, the other a conversation"),
        (ROW | {"objective": "rude"}, "unknown objective"),
        ({"prompt": "Q"}, "no text in column 'response'"),
        ({"prompt": "Q", "responses": ["a", 3]}, "column 'responses' is no list of texts"),
        ({"prompt": "Q", "responses": []}, "column 'responses' is no list of texts"),
        ({"prompt": 3, "response": "a"}, "prompt is neither text nor a list of messages: int"),
    ],
)
def test_what_is_refused(row, reason):
    assert re.search(reason.replace("\\n", r"\\n"), refusal(Improvements(), row, ["kind"]))


def test_what_gaps_refuse():
    assert "no columns chosen and rejected" in refusal(Improvements(gaps=True), {"prompt": "Q", "response": "A"})
    with pytest.raises(ValidationError, match="better has no effect with 'gaps: true'"):
        Improvements(gaps=True, better="both")


# --- in a run -------------------------------------------------------------------------------------------------------

ROLLOUTS = {"samples": 4, "prompts": 3, "rounds": 2, "prompts_per_step": 2, "max_new_tokens": 8}


def judged_pairs(folder, number=4):
    """Two replies of the tiny assistant to each of its first prompts, the more helpful one chosen."""
    folder.mkdir(exist_ok=True)
    rows = []
    for place, prompt in enumerate(PROMPTS[:number]):
        two = [replies(prompt)[index] for index in (11 + 7 * place, 1500 - 31 * place)]
        rejected, chosen = sorted(two, key=lambda reply: score(prompt, reply)["helpful"])
        rows.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(rows))
    return {"path": str(folder / "pairs.jsonl"), "held_out": 0.25, "reader": "improvement"}


def test_one_line_of_configuration_in_the_world_of_the_tiny_assistant(tmp_path):
    reward = {"name": "improvement", "reward": {"name": "tiny-assistant", "objective": "helpful"}}
    steps = steps_on_the_assistant(
        tmp_path,
        loss="rloo",
        rollouts=ROLLOUTS,
        data=judged_pairs(tmp_path),
        objectives={"helpful": {"reward": reward}},
    )
    assert all(-1 <= step["helpful/reward"] < 1 for step in steps) and steps[-1]["gradient_norm"] > 0
    used = json.loads((tmp_path / "run" / "run.json").read_text())["plugins"]
    assert {"reward moalign:improvement", "reward moalign:tiny-assistant", "reader moalign:improvement"} <= set(used)


def test_a_run_on_improvements_trains_what_a_run_on_the_reward_itself_trains(tmp_path):
    """To the last bit, where the reward reads the response alone."""
    right = {"name": "regex", "pattern": "(Good luck|Stay safe|Use)"}
    found = {}
    for name, reward in (("plain", right), ("gap", {"name": "improvement", "reward": right})):
        data = judged_pairs(tmp_path / name)
        objectives = {"right": {"reward": reward}}
        steps = steps_on_the_assistant(
            tmp_path / name, loss="rloo", rollouts=ROLLOUTS, data=data, objectives=objectives
        )
        files = contents(tmp_path / name / "run")
        found[name] = steps, next(each for path, each in files.items() if path.endswith("adapter_model.safetensors"))
    (plain, first), (gap, second) = found.values()
    assert first == second
    assert [step["loss"] for step in plain] == [step["loss"] for step in gap]
    assert any(step["gradient_norm"] > 0 for step in plain)
    assert [step["right/reward"] for step in plain] != [step["right/reward"] for step in gap]


# --- a reward of a reward -------------------------------------------------------------------------------------------


def test_a_field_of_a_kind_is_a_plugin_that_the_configuration_names():
    installed, key = registry.discover(), "objectives.kind.reward"
    for choice in ("length", {"name": "length", "free": 3}, {"name": "moalign:length"}, Length(free=2)):
        built = installed.build("reward", "improvement", {"reward": choice}, key)
        assert isinstance(built.reward, Length)
    for wrong, message in (
        ("lenth", rf"{key}\.reward\.name: no reward is called 'lenth'; did you mean 'length'"),
        ({"name": "length", "fre": 1}, rf"{key}\.reward\.fre: unknown key; did you mean 'free'"),
        ({"free": 1}, rf"{key}\.reward: name a reward"),
        (3, rf"{key}\.reward: name a reward"),
        ("dpo", rf"{key}\.reward\.name: no reward is called 'dpo'"),
    ):
        with pytest.raises((ConfigError, UnknownPluginError), match=message):
            installed.build("reward", "improvement", {"reward": wrong}, key)
    named = installed.named("reward", "improvement", {"reward": {"name": "improvement", "reward": "length"}})
    assert [entry.name for entry in named] == ["improvement", "improvement", "length"]

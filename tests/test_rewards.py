"""How rewards are asked: once per content, failures by the declared policy, all of it counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import PrivateAttr
from sweeps import small_config, write_pairs

from moalign import registry
from moalign.api import Candidate, DataError, ModelError, PluginError, Preference, Reward, Sample
from moalign.config import Config, ObjectiveSettings
from moalign.engine.batches import RolloutSource
from moalign.engine.rewards import Scored, Scorer, key_of, score_all
from moalign.sweeps import run
from moalign.sweeps.candidate import batch_source
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import open_workshop

NAN = float("nan")


class Told(Reward):
    """Answers with what it is told to, and remembers what it was asked."""

    _answer: Callable[[Sequence[Sample]], Any] = PrivateAttr()
    _asked: list[list[str]] = PrivateAttr(default_factory=list)

    def score(self, samples):
        self._asked.append([sample.response for sample in samples])
        return self._answer(samples)


class Moody(Told):
    """Told, and another score at every call, as far as anybody knows."""

    deterministic: ClassVar[bool] = False


def told(answer: Callable[[Sequence[Sample]], Any], kind: type[Told] = Told) -> Told:
    reward = kind()
    reward._answer = answer
    return reward


def number(sample: Sample) -> float | None:
    """The response as a number; a word that is none is a failure, and - an abstention."""
    return None if sample.response == "-" else float(sample.response)


def each(samples: Sequence[Sample]) -> list[float | None]:
    return [number(sample) for sample in samples]


def samples(*responses: str) -> list[Sample]:
    return [Sample("q", response) for response in responses]


def scorer(reward: Reward, warned: list[str] | None = None, **settings: Any) -> Scorer:
    warn = (lambda what: None) if warned is None else warned.append
    return Scorer("kind", reward, ObjectiveSettings(**settings), warn)


def test_abstaining_is_not_a_score_and_a_minimised_objective_is_negated_once():
    column = scorer(told(each), direction="min").score(samples("-", "2"))
    assert np.isnan(column.values[0]) and column.values[1] == -2.0
    assert (column.failed, column.abstained) == (0, 1)


WRONG = {
    "returned 1 scores for 2 samples": lambda asked: [1.0],
    "returned nan; a score is finite, or None": lambda asked: [1.0, NAN],
    "returned inf": lambda asked: [1.0, float("inf")],
    "RuntimeError: no connection": lambda asked: (_ for _ in ()).throw(RuntimeError("no connection")),
    "TypeError: 'NoneType' object is not iterable": lambda asked: None,
    "ZeroDivisionError: division by zero": lambda asked: (1 / 0 for _ in asked),
    "a score is a number": lambda asked: np.ones((2, 1)),
    "'1' is neither": lambda asked: ["1", "2"],
    "int too large": lambda asked: [10**400, 1],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_a_reward_may_not_do_names_the_plugin(message):
    with pytest.raises(PluginError, match="reward 'Told' of test_rewards, in score") as caught:
        scorer(told(WRONG[message])).score(samples("a", "b"))
    assert message in str(caught.value)


# --- the failure policy ---------------------------------------------------------------------------------------------


def test_a_call_that_fails_is_made_for_each_sample_alone_and_those_that_fail_again_are_skipped():
    reward, warned = told(each), []
    asked = scorer(reward, warned, on_error="skip_sample")
    column = asked.score(samples("1", "oh", "-", "oh", "4"))
    np.testing.assert_array_equal(column.values, [1.0, NAN, NAN, NAN, 4.0])
    assert (column.failed, column.abstained, column.skipped) == (2, 1, False)
    assert reward._asked == [["1", "oh", "-", "4"], ["1"], ["oh"], ["-"], ["4"]]
    asked.score(samples("oh", "1"))
    assert reward._asked[5:] == [["oh"]], "what failed is tried again, what has an answer is not"
    assert len(warned) == 1 and "ValueError: could not convert string to float: 'oh'" in warned[0]


def test_a_single_number_that_is_not_finite_costs_no_second_call():
    reward = told(each)
    column = scorer(reward, on_error="skip_sample").score(samples("1", "nan", "3"))
    np.testing.assert_array_equal(column.values, [1.0, NAN, 3.0])
    assert (column.failed, len(reward._asked)) == (1, 1)


def test_the_wrong_number_of_scores_for_all_is_the_right_one_for_each():
    reward = told(lambda asked: each(asked)[:2])
    column = scorer(reward, on_error="skip_sample").score(samples("1", "2", "3"))
    assert column.values.tolist() == [1.0, 2.0, 3.0] and column.failed == 0


def test_what_a_reward_refuses_is_skipped_too():
    def foreign(asked):
        raise DataError("knows primes only")

    assert scorer(told(foreign), on_error="skip_sample").score(samples("1")).failed == 1
    with pytest.raises(PluginError, match="primes"):
        scorer(told(foreign)).score(samples("1"))


@pytest.mark.parametrize("policy", ["skip_sample", "skip_objective"])
def test_what_is_wrong_with_the_configuration_is_not_skipped(policy):
    def elsewhere(asked):
        raise ModelError("no such head")

    with pytest.raises(PluginError, match="no such head"):
        scorer(told(elsewhere), on_error=policy).score(samples("1", "2"), dispensable=True)


@pytest.mark.parametrize("responses", [("1", "nan"), ("1", "oh")])
def test_an_objective_is_skipped_as_a_whole_where_it_is_dispensable(responses):
    warned: list[str] = []
    asked = scorer(told(each), warned, on_error="skip_objective")
    column = asked.score(samples(*responses), dispensable=True)
    assert np.isnan(column.values).all() and column.skipped and column.failed == 2
    assert len(warned) == 1 and "the objective is skipped" in warned[0]
    with pytest.raises(PluginError):
        asked.score(samples(*responses))


def test_figures_are_shares_of_the_samples():
    scorers = [
        replace(scorer(told(each), on_error="skip_sample"), name="a"),
        replace(scorer(told(each), on_error="skip_objective"), name="b"),
        replace(scorer(told(lambda asked: [0.0] * len(asked))), name="c"),
    ]
    scored = score_all(scorers, samples("1", "nan", "-", "2"), dispensable=True)
    assert scored.figures == {"a/failed": 0.25, "a/abstained": 0.25, "b/failed": 1.0, "b/skipped": 1.0}
    assert scored.skipped == (1,)
    np.testing.assert_array_equal(scored.values[:, 0], [1.0, NAN, NAN, 2.0])


def test_a_skipped_objective_stands_still_where_it_was():
    scored = Scored(np.array([[1.0, NAN], [NAN, NAN]]), skipped=(1,))
    np.testing.assert_array_equal(scored.with_constants(None), [[1.0, 0.0], [NAN, 0.0]])
    before = np.array([[5.0, 1.0], [5.0, NAN], [5.0, 3.0]])
    np.testing.assert_array_equal(scored.with_constants(before), [[1.0, 2.0], [NAN, 2.0]])
    assert np.isnan(scored.values[0, 1]), "the values themselves stay unknown"


# --- asked once -----------------------------------------------------------------------------------------------------


def test_a_sample_is_asked_once_in_a_run():
    reward = told(each)
    asked = scorer(reward)
    assert asked.score(samples("1", "2", "1", "-")).values[:3].tolist() == [1.0, 2.0, 1.0]
    again = asked.score([*samples("2", "3", "-"), Sample("another", "2")])
    assert again.values[[0, 1, 3]].tolist() == [2.0, 3.0, 2.0] and again.abstained == 1
    assert reward._asked == [["1", "2", "-"], ["3", "2"]]


def test_a_reward_that_is_not_deterministic_is_asked_once_in_a_call_only():
    reward = told(each, Moody)
    asked = scorer(reward)
    for _ in range(2):
        assert asked.score(samples("1", "2", "1")).values.tolist() == [1.0, 2.0, 1.0]
    assert reward._asked == [["1", "2"]] * 2


def test_the_content_is_the_prompt_with_its_messages_and_the_response():
    talk = ({"role": "user", "content": "Why?"},)
    turned = ({"content": "Why?", "role": "user"},)
    assert key_of(Sample(talk, "x")) == key_of(Sample(turned, "x"))
    different = [Sample("Why?", "x"), Sample(talk, "x"), Sample(talk + talk, "x"), Sample(talk, "x "), Sample("W", "")]
    assert len({key_of(sample) for sample in [*different, Sample("Why?x", ""), Sample("", "Why?x")]}) == 7


# --- coroutines -----------------------------------------------------------------------------------------------------


async def later(asked):
    await asyncio.sleep(0)
    return each(asked)


def test_a_coroutine_is_awaited_also_where_a_loop_runs_already():
    async def notebook():
        return scorer(told(later)).score(samples("1", "2"))

    assert scorer(told(later)).score(samples("1", "2")).values.tolist() == [1.0, 2.0]
    assert asyncio.run(notebook()).values.tolist() == [1.0, 2.0]


def test_what_a_coroutine_raises_is_the_plugins():
    with pytest.raises(PluginError, match="reward 'Told' of test_rewards, in score: ValueError"):
        scorer(told(later)).score(samples("oh"))


# --- in a sweep -----------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{number}: "}) + "\n" for number in range(10)))
    return file


def settings_with(model: Path, prompts: Path, loss: str, **objectives: Any) -> Config:
    return small_config(
        model,
        prompts,
        objectives={name: {"reward": "length", "on_error": policy} for name, policy in objectives.items()},
        search={"name": "grid", "points": len(objectives)},
        loss=loss,
        rollouts={"rounds": 2, "samples": 3, "prompts": 5, "prompts_per_step": 2, "max_new_tokens": 5},
        evaluate={"samples": 8, "max_new_tokens": 6},
    )


class Down(Reward):
    """Always fails."""

    def score(self, samples):
        raise RuntimeError("down")


@pytest.mark.parametrize("loss", ["rloo", "rebel"])
def test_rounds_with_a_skipped_objective_train_on_the_others(tiny_model_path, prompts, loss):
    settings = settings_with(tiny_model_path, prompts, loss, odd="skip_objective", short="stop")
    plan = prepare(settings, registry.discover())
    plan = replace(plan, rewards={**plan.rewards, "odd": Down()})
    shop = open_workshop(plan, Path(), Observer(), keep_cache=False)
    candidate = Candidate("c", Preference("weights", {"odd": 0.5, "short": 0.5}))
    source, other = batch_source(candidate, shop), batch_source(candidate, shop)
    assert isinstance(source, RolloutSource) and isinstance(other, RolloutSource)
    dataset, _ = source.at(0)
    assert (dataset.rewards[:, 0] == 0.0).all() and len(set(dataset.rewards[:, 1])) > 1
    assert source.figures["odd/skipped"] == source.figures["odd/failed"] == 1.0
    assert "short/failed" not in source.figures
    other.at(0)
    assert other.figures == source.figures, "those who share the first round are told of it as well"


class Failing(Reward):
    """Characters of the response, until it is told to fail."""

    _calls: list[int] = PrivateAttr(default_factory=list)

    def score(self, samples):
        self._calls.append(len(samples))
        if len(self._calls) > 1:
            raise RuntimeError("down")
        return [len(sample.response) for sample in samples]


def test_an_objective_that_is_skipped_later_stands_where_it_stood(tiny_model_path, prompts):
    settings = settings_with(tiny_model_path, prompts, "rloo", odd="skip_objective")
    plan = replace(prepare(settings, registry.discover()), rewards={"odd": Failing()})
    shop = open_workshop(plan, Path(), Observer(), keep_cache=False)
    source = batch_source(Candidate("c", Preference("weights", {"odd": 1.0})), shop)
    assert isinstance(source, RolloutSource)
    first, _ = source.at(0)
    later, _ = source.at(3)  # the second round
    assert len(set(first.rewards[:, 0])) > 1 and set(later.rewards[:, 0]) == {first.rewards[:, 0].mean()}
    assert later.advantages is not None and not later.advantages.any()


class Watching(Observer):
    def __init__(self) -> None:
        self.warned: list[str] = []
        self.steps: list[dict[str, Any]] = []

    def on_warning(self, what: str) -> None:
        self.warned.append(what)

    def on_step(self, candidate: Candidate, step: int, metrics: dict[str, Any]) -> None:
        self.steps.append(metrics)


def not_of_digits(reward: Reward, samples: Sequence[Sample]) -> list[float]:
    return [NAN if set("01234") & set(sample.response) else len(sample.response) for sample in samples]


def test_skipped_samples_are_counted_in_metrics_and_evaluation(tiny_model_path, prompts, tmp_path, monkeypatch):
    from moalign_plugins.rewards.length import Length

    monkeypatch.setattr(Length, "score", not_of_digits)
    watching = Watching()
    settings = settings_with(tiny_model_path, prompts, "rloo", odd="skip_sample")
    front = run.start(settings, tmp_path / "run", registry.discover(), watching)
    details = front["points"][0]["details"]
    assert 0 < details["odd/failed"] < 1 and "odd/abstained" not in details
    assert all(0 < metrics["odd/failed"] < 1 for metrics in watching.steps)
    assert len(watching.warned) == 1 and "returned nan" in watching.warned[0]
    with pytest.raises(PluginError, match="returned nan"):
        settings = settings_with(tiny_model_path, prompts, "rloo", odd="stop")
        run.start(settings, tmp_path / "stop", registry.discover(), watching)


@pytest.mark.parametrize("policy", ["skip_sample", "skip_objective"])
def test_responses_in_the_data_are_scored_once_so_that_a_sample_can_be_skipped_and_an_objective_not(
    tiny_model_path, tmp_path, monkeypatch, policy
):
    from moalign_plugins.rewards.length import Length

    monkeypatch.setattr(Length, "score", not_of_digits)
    settings = small_config(
        tiny_model_path,
        write_pairs(tmp_path / "pairs.jsonl"),
        objectives={name: {"reward": "length", "on_error": policy} for name in ("helpful", "harmless")},
        loss="rebel",
    )
    plan = prepare(settings, registry.discover())
    if policy == "skip_objective":
        with pytest.raises(PluginError, match="in score for harmless: it returned nan"):
            open_workshop(plan, Path(), Observer(), keep_cache=False)
        return
    watching = Watching()
    monkeypatch.setattr(Length, "score", lambda self, samples: [*(1.0 for _ in samples[:-1]), NAN])
    counts = open_workshop(plan, Path(), watching, keep_cache=False).material.counts
    assert counts["training: response that the reward of helpful failed on"] == 1
    assert len(watching.warned) == 2, "of each objective"

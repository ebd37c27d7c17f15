"""Greedy responses beside the sampled ones: scored and combined as they are, never trained on, in no statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import PrivateAttr
from sweeps import small_config

from moalign import registry
from moalign.api import Round
from moalign.config import Config
from moalign.engine.advantages import Advantages
from moalign.engine.batches import RolloutSource
from moalign.engine.rewards import Scored
from moalign.engine.rollouts import Rollout
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import ConfigError
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.objectives.remax import ReMax
from moalign_plugins.objectives.rloo import RLOO

PROMPTS, SAMPLES = 5, 3
OBJECTIVES: dict[str, Any] = {
    "brief": {"reward": "length", "transform": [{"name": "scale", "factor": 2.0}]},
    "long": {"reward": "length", "direction": "min"},
}
CANDIDATE = Candidate("c", Preference("weights", {"brief": 0.25, "long": 0.75}))
(SLOT,) = slots(1)


def settings_of(model: Path, folder: Path, **changes: Any) -> Config:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{number}: "}) + "\n" for number in range(12)))
    content: dict[str, Any] = {
        "objectives": OBJECTIVES,
        "train": {"steps": 4, "lr": 2e-3},
        "rollouts": {"rounds": 2, "samples": SAMPLES, "prompts": PROMPTS, "prompts_per_step": 4, "max_new_tokens": 5},
        "loss": {"name": "remax", "beta": 0.1},
    }
    return small_config(model, file, **content | changes)


@pytest.fixture(scope="module")
def workshop(tiny_model_path, tmp_path_factory) -> Workshop:
    settings = settings_of(tiny_model_path, tmp_path_factory.mktemp("data"))
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


class Watching(Linear):
    """Keeps what it is shown."""

    _seen: list[Round] = PrivateAttr(default_factory=list)
    _signals: list[Any] = PrivateAttr(default_factory=list)

    def observe(self, state, seen):
        self._seen.append(seen)
        return state

    def signal(self, rewards, preference, groups, state):
        self._signals.append((rewards.clone(), groups.clone()))
        return super().signal(rewards, preference, groups, state)


def characters(rollout: Rollout) -> list[float]:
    """The first objective counts the codes of the characters, the second the tokens."""
    return [sum(map(ord, rollout.text)) / 100, float(len(rollout.ids))]


def source_of(workshop: Workshop, objective: Any, combiner: Linear, score: Any = None) -> RolloutSource:
    source = batch_source(CANDIDATE, workshop, SLOT)
    assert isinstance(source, RolloutSource)
    names = workshop.plan.objectives
    rule = Advantages(objective, combiner, CANDIDATE.preference, names, "c")
    plain = lambda rollouts: Scored(np.array([characters(each) for each in rollouts]))  # noqa: E731
    return replace(source, first_round=None, advantages=rule, score=score or plain)


def test_the_advantage_is_the_signal_less_that_of_the_greedy_response(workshop):
    combiner = Watching()
    source = source_of(workshop, ReMax(beta=0.0), combiner)
    (rollouts,) = source.sample(0, [None])
    sampled, greedy = rollouts[: PROMPTS * SAMPLES], rollouts[PROMPTS * SAMPLES :]
    assert len(greedy) == PROMPTS and all(each.greedy for each in greedy)
    source.take(0, rollouts)
    dataset, _ = source.at(0)
    assert [each.response for each in dataset.samples] == [each.text for each in sampled]

    def signal(rollout: Rollout) -> float:
        brief, long = characters(rollout)
        return 0.25 * 2.0 * brief + 0.75 * long  # the transform of the first objective doubles it

    own = {each.prompt: signal(each) for each in greedy}
    expected = [signal(each) - own[each.prompt] for each in sampled]
    np.testing.assert_allclose(dataset.advantages, expected, rtol=1e-12, atol=1e-12)
    assert len(set(np.round(expected, 6))) > 5
    assert source.figures["greedy"] == pytest.approx(np.mean([own[each.prompt] for each in sampled]))
    # what adapts, and what takes statistics, sees samples alone
    (seen,) = combiner._seen
    np.testing.assert_array_equal(seen.rewards, [characters(each) for each in sampled])
    (first, groups), (second, _), *_ = combiner._signals  # others are asked for the metrics
    assert groups.tolist() == [each.prompt for each in sampled] and len(first) == len(second) == len(sampled)


def test_what_the_others_say_of_the_samples_is_what_they_say_without_greedy_ones(workshop):
    """Samples, rewards, log-probabilities and all figures of the samples are those of a loss that needs none."""
    found = {}
    for objective in (ReMax(beta=0.1), RLOO(beta=0.1)):
        combiner = Watching()
        source = source_of(workshop, objective, combiner)
        dataset, _ = source.at(0)
        found[type(objective)] = dataset, source.figures, combiner._signals[0], combiner._seen[0]
    (one, figures, (signal, _), seen), (other, others, (plain, _), plainly) = found.values()
    assert one.greedy is not None and other.greedy is None
    assert one.content_hash == other.content_hash
    assert signal.equal(plain) and seen.rewards.equal(plainly.rewards)
    own = {"greedy", "advantage", *(name for name in figures if name.endswith("/normalised"))}
    assert {k: v for k, v in figures.items() if k not in own} == {k: v for k, v in others.items() if k not in own}


def test_they_are_scored_with_the_samples_once_and_never_trained_on(workshop):
    calls: list[list[Rollout]] = []

    def score(rollouts: list[Rollout]) -> Scored:
        calls.append(list(rollouts))
        return Scored(np.array([characters(each) for each in rollouts]))

    source = source_of(workshop, ReMax(beta=0.1), Linear(), score)
    trainee = Trainee(job_of(CANDIDATE, workshop, ()), source, SLOT, lambda step, metrics: None)
    tokens = []
    end = trainee.end
    trainee.end = lambda step: (tokens.append(trainee.metrics.tokens), end(step))
    train_together(workshop.model, [trainee], workshop.cache, workshop.accelerator)
    assert trainee.error is None
    assert [len(each) for each in calls] == [PROMPTS * (SAMPLES + 1)] * 2  # once a round
    longest = [sum(sorted((len(r.ids) for r in each if not r.greedy), reverse=True)[: 4 * SAMPLES]) for each in calls]
    assert all(count <= most for count, most in zip(tokens, np.repeat(longest, 2), strict=True))


def test_without_the_greedy_responses_reward_a_prompt_is_left_out(workshop):
    def score(rollouts: list[Rollout]) -> Scored:
        values = np.array([characters(each) for each in rollouts])
        values[[each.greedy and each.prompt == rollouts[0].prompt for each in rollouts], 0] = np.nan
        return Scored(values)

    source = source_of(workshop, ReMax(beta=0.1), Linear(), score)
    dataset, _ = source.at(0)
    assert dataset.groups[0] not in dataset.groups[dataset.pairs[:, 0]]
    assert len(dataset.pairs) == (PROMPTS - 1) * SAMPLES
    assert dataset.counts == {"sampled responses without a reward": SAMPLES}


def test_responses_cut_off_at_the_longest_length_are_counted(workshop):
    source = source_of(workshop, ReMax(beta=0.1), Linear())
    dataset, _ = source.at(0)
    assert source.figures["truncated"] == sum(each.truncated for each in dataset.sequences) > 0


@pytest.mark.parametrize("combine", ["gdpo", "heron"])
def test_rules_that_compare_responses_with_each_other_are_refused(tiny_model_path, tmp_path, combine):
    settings = settings_of(tiny_model_path, tmp_path, combine=combine)
    with pytest.raises(ConfigError, match=f"combine: '{combine}' compares responses with each other, and loss 'remax'"):
        prepare(settings, registry.discover())


def test_transforms_that_look_at_other_responses_are_refused(tiny_model_path, tmp_path):
    objectives = OBJECTIVES | {"long": {"reward": "length", "transform": ["clip", "whiten"]}}
    settings = settings_of(tiny_model_path, tmp_path, objectives=objectives)
    with pytest.raises(ConfigError, match=r"objectives\.long\.transform\.1: what 'whiten' gives a response depends"):
        prepare(settings, registry.discover())


@pytest.mark.parametrize("key", ["temperature", "top_p"])
def test_another_distribution_than_the_policys_own_is_refused(tiny_model_path, tmp_path, key):
    rollouts = {"rounds": 2, "samples": 2, "prompts": 2, key: 0.9}
    settings = settings_of(tiny_model_path, tmp_path, rollouts=rollouts)
    with pytest.raises(ConfigError, match=f"rollouts.{key}: loss 'remax' follows the policy's own distribution"):
        prepare(settings, registry.discover())
    prepare(settings_of(tiny_model_path, tmp_path, rollouts=rollouts, loss="rebel"), registry.discover())


def test_pairs_of_a_nucleus_are_trained_on(tiny_model_path, tmp_path):
    rollouts = {"rounds": 1, "samples": 4, "prompts": 4, "prompts_per_step": 2, "max_new_tokens": 5, "top_p": 0.5}
    found = []
    for mass in (0.5, 1.0):
        settings = settings_of(tiny_model_path, tmp_path, rollouts=rollouts | {"top_p": mass}, loss="rebel")
        shop = open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)
        source = batch_source(CANDIDATE, shop, SLOT)
        assert isinstance(source, RolloutSource)
        found.append({each.ids for each in source.sample(0, [None])[0]})
    tokens = [{ids[0] for ids in each} for each in found]
    assert found[0] != found[1] and len(tokens[0]) < len(tokens[1])

"""Runs that learn from sampled responses one by one: resumed, side by side, and with rules that adapt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from interruptions import StopAfterSteps, break_off_and_resume, kill_and_resume
from sweeps import contents, small_config

from moalign import lora, registry
from moalign.api import Combiner, Objective
from moalign.config import Config
from moalign.engine.advantages import Advantages
from moalign.engine.batches import RolloutSource
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import ConfigError, PluginError
from moalign.sweeps import run
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.objectives.grpo import GRPO
from moalign_plugins.objectives.rloo import RLOO

LOSSES: dict[str, dict[str, Any]] = {
    "rloo": {"name": "rloo", "beta": 0.1},
    "grpo": {"name": "grpo", "beta": 0.1},
    "remax": {"name": "remax", "beta": 0.1},
}
ROLLOUTS = {"rounds": 4, "samples": 3, "prompts": 5, "prompts_per_step": 4, "max_new_tokens": 5}
STEPS = 12  # three to a round, so that a step meets a prompt of the epoch before again


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{'x' * (number % 3)}{number}: "}) + "\n" for number in range(12)))
    return file


def settings_of(model_path: Path, prompts: Path, loss: str, **changes: Any) -> Config:
    online: dict[str, Any] = {
        "objectives": {"helpful": {"reward": "length"}, "harmless": {"reward": "length", "direction": "min"}},
        "train": {"steps": STEPS, "lr": 2e-3, "together": 2},
        "rollouts": ROLLOUTS,
        "loss": LOSSES[loss],
    }
    return small_config(model_path, prompts, **(online | changes))


@pytest.fixture(scope="module", params=LOSSES)
def settings(request, tiny_model_path, prompts) -> Config:
    return settings_of(tiny_model_path, prompts, request.param)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, settings) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "unbroken"
    run.start(settings, directory, registry.discover(), Observer())
    return directory


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    file = next(iter(sorted(directory.glob("candidates/*/metrics.jsonl"))))
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_figures_of_a_round_are_among_the_metrics(unbroken):
    lines = metrics_of(unbroken)
    assert len(lines) == STEPS
    assert {"signal", "advantage", "kl_sampled", "helpful/reward", "harmless/reward"} <= set(lines[0])
    assert lines[0]["kl_sampled"] == 0 != lines[-1]["kl_sampled"]  # the first round samples the reference itself
    assert lines[0]["helpful/reward"] == -lines[0]["harmless/reward"] < 0  # minus the number of words
    assert all(line["gradient_norm"] > 0 for line in lines)


# --- broken off and resumed -----------------------------------------------------------------------------------------


def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(settings, unbroken, tmp_path):
    resumed = break_off_and_resume(
        settings, tmp_path / "run", StopAfterSteps(9)
    )  # in the second round of two candidates
    assert contents(resumed) == contents(unbroken)


@pytest.mark.parametrize("settings", ["grpo"], indirect=True)
def test_sigkill_in_the_middle_and_resume(settings, unbroken, tmp_path):
    assert contents(kill_and_resume(settings, tmp_path)) == contents(unbroken)


# --- side by side ---------------------------------------------------------------------------------------------------

CANDIDATES = [
    Candidate(f"c{number}", Preference("weights", {"harmless": share, "helpful": 1 - share}))
    for number, share in enumerate((0.0, 0.4, 1.0))
]
NAMES = slots(3)


@pytest.fixture(scope="module", params=LOSSES)
def workshop(request, tiny_model_path, prompts) -> Workshop:
    plan = prepare(settings_of(tiny_model_path, prompts, request.param), registry.discover())
    return open_workshop(plan, Path(), Observer(), keep_cache=False)


def trained(workshop: Workshop, candidates: list[Candidate], **rollouts: Any) -> list[list[dict[str, Any]]]:
    """The metrics of each candidate's steps; the adapters stay in their slots."""
    workshop.first_round.clear()
    told: list[list[dict[str, Any]]] = [[] for _ in candidates]
    trainees = []
    for candidate, slot, mine in zip(candidates, NAMES, told, strict=False):
        source = batch_source(candidate, workshop, slot)
        assert isinstance(source, RolloutSource)
        source = replace(source, settings=source.settings.model_copy(update=rollouts))
        note = lambda step, metrics, mine=mine: mine.append(metrics)  # noqa: E731
        trainees.append(Trainee(job_of(candidate, workshop, ()), source, slot, note))
    train_together(workshop.model, trainees, workshop.cache, workshop.accelerator)
    assert [trainee.error for trainee in trainees] == [None] * len(candidates)
    return told


def test_one_in_a_pass_of_three_is_trained_as_it_would_be_alone(workshop):
    alone = []
    for candidate in CANDIDATES:
        (metrics,) = trained(workshop, [candidate])
        alone.append((metrics, lora.weights(workshop.model.policy, NAMES[0])))
    together = trained(workshop, CANDIDATES)
    for slot, mine, (expected, weights) in zip(NAMES, together, alone, strict=True):
        for name in ("loss", "advantage", "kl_sampled", "gradient_norm"):
            assert [line[name] for line in mine] == pytest.approx([line[name] for line in expected], rel=1e-4, abs=1e-5)
        for name, tensor in lora.weights(workshop.model.policy, slot).items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-5)
    first, *_, last = (weights for _, weights in alone)
    assert max((first[name] - last[name]).abs().max() for name in first) > 1e-3


def test_a_prompt_that_a_step_meets_twice_counts_twice(workshop):
    """All five prompts twice in each step are the five once."""
    (once,) = trained(workshop, CANDIDATES[1:2], prompts_per_step=5)
    (twice,) = trained(workshop, CANDIDATES[1:2], prompts_per_step=10)
    for name in ("loss", "gradient_norm", "kl_sampled"):
        assert [line[name] for line in twice] == pytest.approx([line[name] for line in once], rel=1e-4, abs=1e-5)


# --- rules that adapt -----------------------------------------------------------------------------------------------

REWARDS = np.array([[0.1, 2.0], [0.9, 1.0], [0.3, 0.0], [0.5, 1.5], [0.2, 0.4]])
GROUPS = np.array([3, 3, 3, 8, 8])
HALF = Preference("weights", {"a": 0.5, "b": 0.5})


class Thrice(Linear):
    """Counts rounds, and multiplies advantages or rewards by three."""

    where: str = "advantages"
    fails_at: int = -1

    def init(self, preference: Preference) -> Mapping[str, Any]:
        return {"rounds": 0}

    def observe(self, state, seen):
        return {"rounds": state["rounds"] + 1}

    def signal(self, rewards, preference, groups, state):
        if state["rounds"] == self.fails_at:
            raise ValueError("no signal this time")
        return super().signal(rewards, preference, groups, state) * (3.0 if self.where == "rewards" else 1.0)

    def multiplier(self, state):
        return 3.0 if self.where == "advantages" else 1.0


def advantages(objective: Objective, combiner: Combiner) -> np.ndarray:
    return Advantages(objective, combiner, HALF, ("a", "b"), "c").of(0, REWARDS, GROUPS, None)[0]


def test_a_multiplier_reaches_advantages_that_standardisation_would_rid_of_it():
    """The trap: standardised rewards know no factor. Without a deviation both places are one."""
    plain = advantages(GRPO(), Linear())
    np.testing.assert_allclose(advantages(GRPO(), Thrice()), 3 * plain, rtol=1e-12)
    np.testing.assert_allclose(advantages(GRPO(), Thrice(where="rewards")), plain, rtol=1e-3)
    rloo = RLOO(kl="k2")
    for where in ("rewards", "advantages"):
        np.testing.assert_allclose(advantages(rloo, Thrice(where=where)), 3 * advantages(rloo, Linear()), rtol=1e-12)


def test_a_round_that_fails_and_is_tried_again_is_seen_once(workshop):
    source = batch_source(CANDIDATES[1], workshop, NAMES[0])
    assert isinstance(source, RolloutSource) and source.advantages is not None
    lora.add_slots(workshop.model.policy, NAMES)
    objectives = workshop.plan.objectives
    preference = CANDIDATES[1].preference
    source.advantages = Advantages(source.advantages.objective, Thrice(fails_at=1), preference, objectives, "c")
    rollouts = source.sample(0, [NAMES[0]])[0]
    for _ in range(2):
        with pytest.raises(PluginError, match="no signal this time"):
            source.take(0, rollouts)
    assert source.advantages.state == {"rounds": 0}
    source.advantages = Advantages(source.advantages.objective, Thrice(), preference, objectives, "c")
    source.take(0, rollouts)
    assert source.advantages.state == {"rounds": 1}


class WithoutOld(RLOO):
    """Reads no old log-probabilities, and says so."""

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "reference"})

    def loss(self, batch, terms):
        assert batch.old_logps is None and batch.ref_logps is not None
        return -self.over_length((batch.logps * batch.mask).sum(-1), batch) * batch.advantages


def test_what_a_loss_does_not_declare_is_not_there(workshop):
    job, source = job_of(CANDIDATES[1], workshop, ()), batch_source(CANDIDATES[1], workshop, NAMES[0])
    assert isinstance(source, RolloutSource)
    objective = WithoutOld()
    preference, objectives = CANDIDATES[1].preference, workshop.plan.objectives
    source = replace(source, advantages=Advantages(objective, Linear(), preference, objectives, "c1"))
    job = replace(job, objective=objective, needs=objective.needs)
    trainee = Trainee(job, source, NAMES[0], lambda step, metrics: None)
    train_together(workshop.model, [trainee], workshop.cache, workshop.accelerator)
    assert trainee.result.steps == STEPS


# --- what is refused ------------------------------------------------------------------------------------------------


class Mean(Objective):
    """Reduces."""

    needs: ClassVar[frozenset[str]] = frozenset({"groups"})

    def advantages(self, signal, groups, log_ratios):
        return signal * 1.0

    def loss(self, batch, terms):
        return (batch.logps.sum(-1) * batch.advantages).mean()


def test_a_loss_that_reduces_is_refused(workshop):
    job = job_of(CANDIDATES[0], workshop, ())
    source = batch_source(CANDIDATES[0], workshop, NAMES[0])
    assert isinstance(source, RolloutSource)
    rule = Advantages(Mean(), workshop.plan.combiner, CANDIDATES[0].preference, workshop.plan.objectives, "c0")
    source = replace(source, advantages=rule)
    trainee = Trainee(replace(job, objective=Mean(), needs=Mean.needs), source, NAMES[0], lambda step, metrics: None)
    train_together(workshop.model, [trainee], workshop.cache, workshop.accelerator)
    with pytest.raises(PluginError, match=r"one loss per response, float32 \[\d+\] on cpu, not float32 \[\] on cpu"):
        _ = trainee.result


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rollouts": None}, "learns from responses that the policy samples; add rollouts"),
        ({"rollouts": ROLLOUTS | {"temperature": 0.7}}, "it must be 1"),
        ({"combine": "modpo"}, "groups of responses"),
        ({"model": {"lora": {"dropout": 0.1}}}, "their ratio would be noise, so it must be 0"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(tiny_model_path, prompts, changes, reason):
    changes = changes | {"model": {"path": str(tiny_model_path)} | changes.get("model", {})}
    with pytest.raises(ConfigError, match=reason):
        prepare(settings_of(tiny_model_path, prompts, "grpo", **changes), registry.discover())

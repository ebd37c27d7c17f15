"""Posteriors of a training: kept without a change to it, of the weights after each of its last steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from interruptions import StopAfterSteps
from posteriors import FILE, KEEPING, LAST, STEPS, TRAIN, largest
from sweeps import contents, small_config, write_pairs

import moalign
from moalign import config, lora, registry
from moalign.api import Objective, Search
from moalign.engine import memory, snapshots
from moalign.engine.scoring import LogpCache
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import ConfigError, PluginError
from moalign.sweeps import together
from moalign.sweeps.candidate import batch_source, job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def directory(tiny_model_path, pairs, tmp_path_factory) -> Path:
    settings = small_config(tiny_model_path, pairs, train=KEEPING)
    return moalign.sweep(settings, tmp_path_factory.mktemp("runs") / "run").directory


def test_a_run_that_keeps_posteriors_trains_the_same_to_the_bit(tiny_model_path, pairs, directory, tmp_path):
    """Adapters, scores, metrics and samples; there is one file more in each folder."""
    moalign.sweep(small_config(tiny_model_path, pairs, train=TRAIN), tmp_path / "plain")
    plain, found = contents(tmp_path / "plain"), contents(directory)
    more = {name for name in found if name.endswith(FILE)}
    assert len(more) == 3 and found.keys() - more == plain.keys()
    differing = {name for name in plain if plain[name] != found[name]}
    assert all(name.endswith("MANIFEST.json") for name in differing)


@pytest.fixture(scope="module")
def workshop(tiny_model_path, pairs) -> Workshop:
    settings = small_config(tiny_model_path, pairs, train=KEEPING)
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


@pytest.mark.parametrize("rank", [4, 2])
def test_it_is_mean_and_deviation_of_the_adapter_after_each_of_the_last_steps(workshop, rank):
    """By name against numpy, for two in a pass, also of a smaller rank than the slot has room for; nothing moves."""
    preferences = [Preference("weights", {"harmless": share, "helpful": 1 - share}) for share in (0.2, 0.9)]
    candidates = [Candidate(f"c{k}", each, changes={"model.lora.r": rank}) for k, each in enumerate(preferences)]
    seen: dict[str, list[dict[str, torch.Tensor]]] = {"candidate": [], "candidate1": []}

    def trainee(candidate: Candidate, slot: str) -> Trainee:
        def on_step(step: int, values: dict[str, Any]) -> None:
            seen[slot].append(lora.weights(workshop.model.policy, slot))

        return Trainee(job_of(candidate, workshop, ()), batch_source(candidate, workshop, slot), slot, on_step)

    trainees = [trainee(*each) for each in zip(candidates, seen, strict=True)]
    train_together(workshop.model, trainees, LogpCache(workshop.model), Accelerator())
    for each in trainees:
        policy, last = workshop.model.policy, seen[each.slot]
        found = snapshots.posterior(policy, each.slot, each.parameters, each.moments)
        assert each.moments.count == LAST and len(last) == STEPS
        assert largest(lora.weights(policy, each.slot), last[-1]) == 0.0
        for name, tensor in found.mean.items():
            stacked = torch.stack([tensors[name] for tensors in last[-LAST:]]).double().numpy()
            np.testing.assert_allclose(tensor, stacked.mean(0), rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(found.deviation[name], stacked.std(0), rtol=1e-5, atol=1e-9)
        assert max(float(each.max()) for each in found.deviation.values()) > 1e-3
    with_it, without = (
        together.memory_of(candidates, replaced, [2])[1][2] for replaced in (workshop, without_posterior(workshop))
    )
    moments = sum(
        t.nbytes for each in trainees for part in (each.moments.mean, each.moments.squares) for t in part.values()
    )
    assert with_it - without == moments == 2 * 4 * memory.measure(workshop.model).adapter


def without_posterior(workshop: Workshop) -> Workshop:
    train = workshop.plan.config.train.model_copy(update={"posterior": None})
    plan = replace(workshop.plan, config=workshop.plan.config.model_copy(update={"train": train}))
    return replace(workshop, plan=plan)


def test_a_step_that_was_skipped_counts_with_the_weights_that_it_left(workshop):
    candidate = Candidate("c", Preference("weights", {"harmless": 0.5, "helpful": 0.5}))
    job, seen = job_of(candidate, workshop, ()), list[dict[str, torch.Tensor]]()
    inner, skipped = job.objective, STEPS - 2

    class Once(Objective):
        needs = frozenset({"pairs", "reference"})

        def loss(self, batch, terms):
            return inner.loss(batch, terms) * (float("inf") if len(seen) == skipped else 1.0)

    def on_step(step: int, values: dict[str, Any]) -> None:
        assert ("skipped" in values) == (step == skipped)
        seen.append(lora.weights(workshop.model.policy, "candidate"))

    trainee = Trainee(replace(job, objective=Once()), batch_source(candidate, workshop), "candidate", on_step)
    train_together(workshop.model, [trainee], LogpCache(workshop.model), Accelerator())
    found = snapshots.posterior(workshop.model.policy, "candidate", trainee.parameters, trainee.moments)
    assert trainee.result.skipped == 1 and trainee.moments.count == LAST
    assert largest(seen[skipped], seen[skipped - 1]) == 0.0 < largest(seen[-1], seen[skipped])
    mean = {name: torch.stack([each[name] for each in seen[-LAST:]]).double().mean(0) for name in found.mean}
    assert largest(dict(found.mean), mean) < 1e-7


def test_interrupted_and_resumed_has_the_same_posteriors(tiny_model_path, pairs, directory, tmp_path):
    settings = small_config(tiny_model_path, pairs, train=KEEPING)
    with pytest.raises(KeyboardInterrupt):
        moalign.sweep(settings, tmp_path / "run", observer=StopAfterSteps(2 * STEPS + 7))
    moalign.resume(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(directory)


@pytest.mark.parametrize(
    ("train", "steps"), [({"steps": 30, "posterior": 0.1}, 3), ({"posterior": 1.0}, 200), ({"posterior": None}, 0)]
)
def test_the_share_of_the_steps_is_counted_as_it_is_written(train, steps):
    """0.1 of 30 are 3, though 0.1 * 30 > 3 in floats."""
    settings = config.TrainSettings(**train)
    assert settings.posterior_steps == steps
    assert sum(snapshots.counts(step, settings) for step in range(settings.steps)) == steps
    assert steps == 0 or snapshots.counts(settings.steps - 1, settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"steps": 6, "posterior": 0.1}}, r"train\.posterior: this is one step of 6, .* no deviation"),
        ({"train": {"posterior": 0.5, "early_stop": {}}}, r"train\.posterior: with train\.early_stop the last steps"),
        ({"train": {"posterior": 0}}, r"train\.posterior: .*greater than 0"),
        ({"train": {"posterior": 1.1}}, r"train\.posterior: .*less than or equal to 1"),
        (
            {"train": KEEPING, "condition": "prompt-text"},
            r"train\.posterior: condition: .* one model",
        ),
    ],
)
def test_what_makes_no_posterior_is_refused_before_training(tiny_model_path, pairs, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(small_config(tiny_model_path, pairs, **changes), registry.discover())


def test_candidates_do_not_differ_in_it(workshop):
    with pytest.raises(ConfigError, match=r"train\.posterior: cannot differ between candidates"):
        workshop.plan.variant({"train.posterior": 0.1})
    with pytest.raises(ConfigError, match=r"train\.posterior: this is one step of 2"):
        workshop.plan.variant({"train.steps": 2})


def test_a_search_that_wants_steps_too_few_for_it_is_told(tiny_model_path, pairs):
    class Short(Search):
        def propose(self, space, history, rng):
            wanted = Preference("weights", {"harmless": 0.5, "helpful": 0.5})
            return [] if history else [Candidate("short", wanted, changes={"train.steps": 1})]

    plan = prepare(small_config(tiny_model_path, pairs, train=KEEPING), registry.discover())
    with pytest.raises(
        PluginError, match=r"with changes that do not work: changes:\ntrain\.posterior: this is one step of 1"
    ):
        replace(plan, search=Short()).propose(())

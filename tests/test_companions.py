"""A second adapter beside the candidate's: what it learns, when it is asked, and what becomes of it; through PRIME."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptions import StopAfterSteps
from sweeps import contents, steps_on_the_assistant
from torch import Tensor
from value_heads import settings_of, trained, write_prompts

from moalign import config, lora, registry, storage
from moalign.api import Batch, Objective, PairTerms
from moalign.engine import companions
from moalign.engine.batches import OfflineSource, RolloutSource
from moalign.engine.judging import Judging
from moalign.engine.scoring import logps_under
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import ConfigError, PluginError
from moalign.seeds import derive
from moalign.sweeps import run, together
from moalign.sweeps.candidate import batch_source, job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference
from moalign_plugins.objectives.prime import PRIME, ProcessModel
from moalign_plugins.reward_models.implicit_outcome import ImplicitFromOutcomes

ROLLOUTS = {"rounds": 3, "samples": 4, "prompts": 4, "prompts_per_step": 4, "max_new_tokens": 6}
HALF = Candidate("c", Preference("weights", {"harmless": 0.5, "helpful": 0.5}))
SLOT = "candidate"


def settings(model: Path, prompts: Path, **changes: Any) -> config.Config:
    own: dict[str, Any] = {
        "objectives": {
            "harmless": {"reward": {"name": "regex", "pattern": "[a-m]"}},
            "helpful": {"reward": {"name": "regex", "pattern": "[g-z]"}},
        },
        "loss": {"name": "prime", "process_lr": 3.0},
        "rollouts": ROLLOUTS,
        "train": {"steps": 6, "lr": 2e-3, "together": 2},
    }
    return settings_of(model, prompts, **(own | changes))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.fixture(scope="module")
def plain(tiny_model_path, prompts) -> config.Config:
    return settings(tiny_model_path, prompts)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, plain) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "unbroken"
    run.start(plain, directory, registry.discover(), Observer())
    return directory


@pytest.fixture(scope="module")
def workshop(plain) -> Workshop:
    return open_workshop(prepare(plain, registry.discover()), Path(), Observer(), keep_cache=False)


def trainee_of(workshop: Workshop, candidate: Candidate = HALF, slot: str = SLOT) -> tuple[Trainee, list[dict]]:
    told: list[dict] = []
    source = batch_source(candidate, workshop, slot)
    return Trainee(job_of(candidate, workshop, ()), source, slot, lambda step, metrics: told.append(metrics)), told


def weights_of(workshop: Workshop, slot: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lora.weights(workshop.model.policy, slot).items()}


# --- in whole runs --------------------------------------------------------------------------------------------------


def test_it_lies_beside_the_adapter_and_in_the_manifest_and_is_an_adapter(unbroken, tiny_model_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folders = sorted((unbroken / "candidates").iterdir())
    assert len(folders) == 3
    for folder in folders:
        beside = folder / companions.NAME
        listed = storage.read_json(folder / "MANIFEST.json")["files"]
        assert {f"{companions.NAME}/{lora.WEIGHTS_FILE}", f"{companions.NAME}/{lora.CONFIG_FILE}"} <= set(listed)
        assert storage.verify(folder) == []
        own, other = (storage.read_tensors(each / lora.WEIGHTS_FILE) for each in (folder, beside))
        assert own.keys() == other.keys() and not all(torch.equal(own[name], other[name]) for name in own)
        assert any(bool(tensor.any()) for name, tensor in other.items() if "lora_B" in name)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), folders[0] / companions.NAME)


def test_its_figures_stand_in_the_lines_of_the_candidate(unbroken):
    lines = [json.loads(line) for line in (unbroken / "candidates/w-0.50-0.50/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and lines[0]["companion/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert all(line["companion/gradient_norm"] > 0 for line in lines)
    assert lines[-1]["companion/loss"] < lines[0]["companion/loss"]
    assert lines[0]["loss/ranked"] == 0.5 and {line["loss/kept"] for line in lines} == {1.0}
    assert lines[-1]["loss/ranked"] != 0.5


def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(plain, unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run.start(plain, tmp_path / "run", registry.discover(), StopAfterSteps(9))
    run.resume(tmp_path / "run", registry.discover(), Observer())
    found = contents(tmp_path / "run")
    assert found == contents(unbroken)
    assert sum(f"/{companions.NAME}/{lora.WEIGHTS_FILE}" in name for name in found) == 3


def test_a_warm_start_goes_on_with_the_parents_companion(tiny_model_path, prompts, tmp_path):
    """The process model's loss begins where that of its parent has come to, and not at log 2."""
    search = {"name": "grid", "points": 5, "warm_start": "neighbour", "warm_steps": 0.5}
    own = settings(tiny_model_path, prompts, search=search)
    run.start(own, tmp_path / "run", registry.discover(), Observer())
    first = {
        folder.name: json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["companion/loss"]
        for folder in sorted((tmp_path / "run/candidates").iterdir())
    }
    warm = {name for name, loss in first.items() if loss != pytest.approx(np.log(2), abs=1e-6)}
    assert warm == {"w-0.25-0.75", "w-0.75-0.25"}


def test_one_line_on_the_assistant(tmp_path):
    lines = steps_on_the_assistant(
        tmp_path,
        loss="prime",
        rollouts={"rounds": 2, "samples": 6, "prompts": 3, "prompts_per_step": 3, "max_new_tokens": 40},
        train={"steps": 4, "lr": 1e-3},
    )
    assert [line["loss/ranked"] == 0.5 for line in lines[:3]] == [True, True, False]
    assert lines[1]["companion/loss"] < lines[0]["companion/loss"]


# --- what it learns, and when it is asked -----------------------------------------------------------------------------


def test_it_learns_what_a_reward_model_learns_from_the_same_outcomes(workshop):
    """In the first round, against the loop that trains reward models, on the round's responses and their rewards."""
    workshop.first_round.clear()
    leader, _ = trainee_of(workshop)
    steps = leader.job.settings.steps
    batches = []
    at = RolloutSource.at

    def keeping(self, step):
        dataset, rows = at(self, step)
        batches.append((step, dataset, rows))
        return dataset, rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutSource, "at", keeping)
        leader.job = replace(leader.job, settings=leader.job.settings.model_copy(update={"steps": 2}))
        train_together(workshop.model, [leader], workshop.cache, workshop.accelerator)
    assert leader.error is None and steps == 6 and {step for step, *_ in batches} == {0, 1}
    found = weights_of(workshop, companions.slot_of(SLOT))

    class Same(OfflineSource):
        def at(self, step):
            _, dataset, rows = next(each for each in batches if each[0] == step)
            outcome = dataset.rewards.mean(1, keepdims=True)  # equal weights
            return replace(dataset, objectives=("right",), rewards=outcome, known={}, token_advantages=None), rows

    form = ImplicitFromOutcomes()
    job = replace(
        leader.job,
        objective=Judging(form=form, objectives=("right",)),
        needs=form.needs | {"groups"},
        objectives=("right",),
        preference=(1.0,),
        settings=leader.job.settings.model_copy(update={"lr": 3 * leader.job.settings.lr}),
        seed=derive(leader.job.seed, companions.NAME),
    )
    judge = Trainee(job, Same(batches[0][1], 0, 4, cacheable=False), SLOT, lambda step, metrics: None)
    train_together(workshop.model, [judge], workshop.cache, workshop.accelerator)
    expected = weights_of(workshop, SLOT)
    assert judge.error is None and found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert any(bool(value.any()) for name, value in found.items() if "lora_B" in name)


def test_a_round_is_measured_by_the_model_that_learned_from_the_rounds_before(workshop, monkeypatch):
    """It says what its adapter says then: in the first round the reference, to the last bit."""
    workshop.first_round.clear()
    leader, told = trainee_of(workshop)
    measured: list[list[tuple[Tensor, Tensor]]] = []
    measure, logps = PRIME.measure, RolloutSource.logps

    def asking(self, dataset, measuring):
        measured.append([])
        found = logps(self, dataset, measuring)
        (now,) = logps_under(self.model, dataset.sequences, dataset.groups.tolist(), (companions.slot_of(SLOT),))
        said = sorted(float(row.sum()) for own, _ in measured[-1] for row in own)
        assert said == pytest.approx(sorted(float(each.sum()) for each in now), abs=1e-4)
        return found

    def noting(self, batch):
        measured[-1].append((batch.guides["companion"] * batch.mask, batch.ref_logps * batch.mask))
        return measure(self, batch)

    monkeypatch.setattr(PRIME, "measure", noting)
    monkeypatch.setattr(RolloutSource, "logps", asking)
    train_together(workshop.model, [leader], workshop.cache, workshop.accelerator)
    assert leader.error is None and len(measured) == 3 and len(told) == 6
    apart = [max(float((own - reference).abs().max()) for own, reference in each) for each in measured]
    assert 0 == apart[0] < apart[1] < apart[2]


def test_who_is_trained_beside_does_not_matter(workshop):
    others = [Candidate("a", Preference("weights", {"harmless": 1.0, "helpful": 0.0})), HALF]
    found = []
    for group in ([HALF], others):
        slots = [SLOT, f"{SLOT}1"][: len(group)]
        made = [trainee_of(workshop, candidate, slot) for candidate, slot in zip(group, slots, strict=True)]
        trained(workshop, [each for each, _ in made])
        found.append((made[-1][1], weights_of(workshop, companions.slot_of(slots[-1]))))
    (alone, own), (beside, other) = found
    for one, same in zip(alone, beside, strict=True):
        for name in ("companion/loss", "loss", "loss/ranked", "signal"):
            assert same[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5)
    for name, value in own.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_one_whose_companion_fails_fails_with_it_and_the_others_go_on(workshop, monkeypatch):
    """Outcomes beyond 1 are of one candidate alone."""
    workshop.first_round.clear()
    made = [trainee_of(workshop, HALF, SLOT), trainee_of(workshop, replace(HALF, id="other"), f"{SLOT}1")]
    plain = ProcessModel.loss

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        known = {**batch.known, "outcome": batch.known["outcome"] + 2} if fails and fails.pop() else batch.known
        return plain(self, replace(batch, known=known), terms)

    fails = [True]
    monkeypatch.setattr(ProcessModel, "loss", loss)
    train_together(workshop.model, [each for each, _ in made], workshop.cache, workshop.accelerator)
    errors = [each.error for each, _ in made]
    assert "objective 'prime' of moalign" in str(errors[0]) and "not from 0 (wrong) to 1 (right)" in str(errors[0])
    assert "the adapter that its loss trains beside it" in str(errors[0]) and errors[1] is None
    assert len(made[0][1]) == 1 and len(made[1][1]) == 6


class Odd(PRIME):
    what: str = "none"

    def companion(self) -> Any:
        return {"text": "prime", "pairs": Pairs(), "none": None}[self.what]


class Pairs(Objective):
    pass


class OfResponses(PRIME):
    needs = PRIME.needs - {"token_advantages"}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Odd(what="text"), r"in companion: it must return a moalign\.api\.Objective or None, not str"),
        (Odd(what="pairs"), "in companion: it needs pairs; it is to need groups"),
        (OfResponses(), "only a loss that needs token_advantages"),
    ],
    ids=["text", "pairs", "responses"],
)
def test_what_is_no_companion_names_the_plugin(objective, message):
    with pytest.raises(PluginError, match=message):
        companions.companion_of(objective)
    assert companions.companion_of(Odd()) is None


def test_adapters_that_cannot_share_a_pass_are_refused_before_training(tiny_model_path, prompts):
    content = settings(tiny_model_path, prompts).model_dump(mode="json")
    content["model"]["lora"] |= {"targets": ["q_proj", "embed_tokens"]}
    plan = prepare(config.from_mapping(content), registry.discover())
    with pytest.raises(ConfigError, match=r"loss: 'prime' trains a second adapter in the same passes, and a layer of"):
        open_workshop(plan, Path(), Observer(), keep_cache=False)


def test_memory_counts_both_adapters(workshop):
    plan = prepare(replace_loss(workshop.plan.config, "rloo"), registry.discover())
    (_, both), (_, one) = (together.memory_of([HALF], shop, [1]) for shop in (workshop, replace(workshop, plan=plan)))
    adapter = sum(each.nbytes for each in weights_of(workshop, SLOT).values())
    assert both[1] - one[1] >= 4 * adapter  # weights, gradient and two moments, and the rows of its passes


def replace_loss(settings: config.Config, name: str) -> config.Config:
    return config.from_mapping(settings.model_dump(mode="json") | {"loss": name})

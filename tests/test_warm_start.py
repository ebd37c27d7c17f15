"""Candidates that start from others, and candidates that are trained differently from the configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interruptions import StopAfterCandidates, break_off_and_resume
from peft import PeftModel
from sweeps import small_config, write_pairs
from transformers import AutoModelForCausalLM

from moalign import lora, registry, storage
from moalign.api import Candidate, Objective, Outcome, Preference, Search
from moalign.engine.model import TRAINED
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import PluginError, TrainingError
from moalign.sweeps import run
from moalign.sweeps.candidate import batch_source, job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import open_workshop

WARM = {"name": "grid", "points": 5, "warm_start": "neighbour", "warm_steps": 0.5}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def contents(directory: Path) -> dict[str, bytes]:
    left_out = (".lock", "run.json")
    files = [file for file in directory.rglob("*") if file.is_file() and "cache" not in file.parts]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files if file.name not in left_out}


def test_a_warm_start_takes_fewer_steps_from_the_nearest_finished_candidate(tiny_model_path, pairs, tmp_path):
    result = run.start(
        small_config(tiny_model_path, pairs, search=WARM), tmp_path / "run", registry.discover(), Observer()
    )
    points = {point["id"]: point for point in result["points"]}
    assert {name: point["parents"] for name, point in points.items()} == {
        "w-1.00-0.00": {},
        "w-0.00-1.00": {},
        "w-0.50-0.50": {},
        "w-0.25-0.75": {"w-0.00-1.00": 1.0},
        "w-0.75-0.25": {"w-1.00-0.00": 1.0},
    }
    lines = {name: (tmp_path / "run/candidates" / name / "metrics.jsonl").read_text().splitlines() for name in points}
    assert {len(lines[name]) for name in points if points[name]["parents"]} == {3}
    assert {len(lines[name]) for name in points if not points[name]["parents"]} == {6}
    first = json.loads(lines["w-0.25-0.75"][0])
    assert first["loss"] != pytest.approx(json.loads(lines["w-0.50-0.50"][0])["loss"], abs=1e-3)  # not the base


@pytest.mark.parametrize("after", [2, 4])
def test_an_interrupted_warm_start_goes_on(tiny_model_path, pairs, tmp_path, after):
    settings = small_config(tiny_model_path, pairs, search=WARM)
    run.start(settings, tmp_path / "whole", registry.discover(), Observer())
    resumed = break_off_and_resume(settings, tmp_path / "run", StopAfterCandidates(after))
    assert contents(resumed) == contents(tmp_path / "whole")


def test_training_from_a_parent_begins_with_its_weights(tiny_model_path, pairs, tmp_path):
    settings = small_config(tiny_model_path, pairs)
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    workshop = open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)
    parent = tmp_path / "run/candidates/w-0.50-0.50"
    candidate = Candidate("next", Preference("weights", {"harmless": 0.5, "helpful": 0.5}))
    job = job_of(candidate, workshop, ())
    job = replace(job, settings=job.settings.model_copy(update={"lr": 0.0}))
    trainee = Trainee(job, batch_source(candidate, workshop), TRAINED, lambda *_: None, parent)
    train_together(workshop.model, [trainee], workshop.cache, workshop.accelerator)
    found = lora.weights(workshop.model.policy, TRAINED)
    written = storage.read_tensors(parent / lora.WEIGHTS_FILE)
    assert found.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in found.items())


def damaged(folder: Path) -> None:
    data = bytearray((folder / lora.WEIGHTS_FILE).read_bytes())
    data[-5] ^= 1
    (folder / lora.WEIGHTS_FILE).write_bytes(data)


def of_another_kind(folder: Path) -> None:
    file = folder / lora.CONFIG_FILE
    storage.write_json(file, {**storage.read_json(file), "use_rslora": True})


@pytest.mark.parametrize(
    ("change", "error"),
    [(damaged, "w-1.00-0.00/adapter_model.safetensors"), (of_another_kind, "use_rslora is True")],
)
def test_a_parent_that_cannot_be_read_fails_its_child_alone(tiny_model_path, pairs, tmp_path, change, error):
    class Damaging(Observer):
        def on_candidate_start(self, candidate):
            if candidate.parents == ("w-1.00-0.00",):
                change(tmp_path / "run/candidates/w-1.00-0.00")

    settings = small_config(tiny_model_path, pairs, search=WARM)
    result = run.start(settings, tmp_path / "run", registry.discover(), Damaging())
    assert [failed["id"] for failed in result["failed"]] == ["w-0.75-0.25"]
    assert error in result["failed"][0]["error"]
    assert len(result["points"]) == 4


# --- changes --------------------------------------------------------------------------------------------------------


class Changing(Search):
    """Three candidates that are not trained alike."""

    changes: tuple[dict, ...] = ()
    parents: tuple[str, ...] = ()

    def propose(self, space, history, rng):
        seen = {outcome.id for outcome in history}
        equal = Preference("weights", dict.fromkeys(space.objectives, 1 / len(space.objectives)))
        made = [Candidate(f"c{n}", equal, self.parents, changes=each) for n, each in enumerate(self.changes)]
        return [candidate for candidate in made if candidate.id not in seen]


def plan_of(model: Path, pairs: Path, *changes: dict, parents: tuple[str, ...] = (), together: int = 3):
    train = {"steps": 5, "pairs_per_step": 6, "lr": 1e-2, "together": together}
    plan = prepare(small_config(model, pairs, train=train, loss={"name": "dpo", "beta": 0.3}), registry.discover())
    return replace(plan, search=Changing(changes=changes, parents=parents))


CHANGES: tuple[dict, ...] = (
    {"train.steps": 3, "train.lr": 3e-3, "loss.beta": 0.05},
    {"model.lora.r": 2, "model.lora.alpha": 3.0, "train.pairs_per_step": 4},
    {},
)


def test_candidates_that_differ_are_trained_in_one_pass_as_alone(tiny_model_path, pairs, tmp_path):
    found = {}
    for together in (1, 3):
        plan = plan_of(tiny_model_path, pairs, *CHANGES, together=together)
        front = run._execute(plan, tmp_path / str(together), {}, Observer())
        assert [point["changes"] for point in front["points"]] == list(CHANGES)
        folders = [tmp_path / str(together) / "candidates" / f"c{n}" for n in range(3)]
        found[together] = [storage.read_tensors(folder / lora.WEIGHTS_FILE) for folder in folders]
    for alone, mine in zip(found[1], found[3], strict=True):
        for name, tensor in alone.items():
            torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-5)
    assert {tensor.shape[0] for name, tensor in found[3][1].items() if "lora_A" in name} == {2}
    assert {tensor.shape[1] for name, tensor in found[3][1].items() if "lora_B" in name} == {2}
    small = json.loads((tmp_path / "3/candidates/c1" / lora.CONFIG_FILE).read_text())
    assert (small["r"], small["lora_alpha"]) == (2, 3.0)


def test_plain_peft_loads_a_smaller_rank_and_so_does_a_slot_with_room(tiny_model_path, pairs, tmp_path):
    run._execute(plan_of(tiny_model_path, pairs, *CHANGES), tmp_path / "run", {}, Observer())
    workshop = open_workshop(plan_of(tiny_model_path, pairs, *CHANGES), Path(), Observer(), keep_cache=False)
    folder = tmp_path / "run/candidates/c1"
    lora.read(workshop.model.policy, TRAINED, folder, workshop.model.fingerprint)
    ids = torch.tensor([workshop.material.train.sequences[0].ids])
    with lora.active(workshop.model.policy, TRAINED):
        mine = workshop.model.base(input_ids=ids).logits
    with lora.active(workshop.model.policy, None):
        base = workshop.model.base(input_ids=ids).logits
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(mine, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert (mine - base).abs().max() > 1e-3
    lora.add_slots(workshop.model.policy, ["another"])
    assert lora.room(workshop.model.policy, "another") == 4  # not the rank of what lies in the first slot


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.lrr": 1}, r"'c0' .*train\.lrr: cannot differ between candidates; did you mean 'train\.lr'"),
        ({"train.together": 2}, r"train\.together: cannot differ"),
        ({"train.lr": -1}, r"train\.lr: .*greater than 0"),
        ({"loss.betta": 1}, r"loss\.betta: unknown key; did you mean 'beta'"),
        ({"model.lora.r": 5}, r"model\.lora\.r 5; the configuration has room for 4"),
    ],
)
def test_changes_that_cannot_work_are_refused_by_key(tiny_model_path, pairs, changes, message):
    with pytest.raises(PluginError, match=message):
        plan_of(tiny_model_path, pairs, changes).propose(())


def test_a_parent_must_be_done(tiny_model_path, pairs):
    with pytest.raises(PluginError, match=r"'c0' with the parents \('nobody',\)"):
        plan_of(tiny_model_path, pairs, {}, parents=("nobody",)).propose(())


@pytest.mark.parametrize("changes", [{"model.lora.r": 2}, {"model.lora.alpha": 3.0}])
@pytest.mark.parametrize(("shares", "parents"), [({"p": 0.5}, ()), ({}, ("p",)), ({}, ("mix",)), ({"mix": 1.0}, ())])
def test_training_does_not_start_from_another_rank_or_alpha(tiny_model_path, pairs, changes, shares, parents):
    equal = Preference("weights", {"harmless": 0.5, "helpful": 0.5})
    child = Candidate("child", equal, parents, shares=shares)

    class Wanting(Search):
        mixed: bool = False

        def propose(self, space, history, rng):
            return [replace(child, mixed=self.mixed)]

    def history(changes):
        parent = Outcome("p", "done", equal, changes=changes)
        return parent, Outcome("mix", "done", equal, kind="mixed", parents={"p": 1.0})

    plan = replace(plan_of(tiny_model_path, pairs), search=Wanting())
    with pytest.raises(PluginError, match=f"'child' to start from '{(*parents, *shares)[0]}', which has another rank"):
        plan.propose(history(changes))
    assert plan.propose(history({"model.lora.r": 4, "model.lora.alpha": 8, "train.lr": 1e-3})) == [child]
    if shares:  # deltas of any rank can be mixed
        (mixed,) = replace(plan, search=Wanting(mixed=True)).propose(history(changes))
        assert mixed.shares == shares


def test_an_implicit_reward_has_the_strength_its_adapter_was_trained_with(tiny_model_path, pairs, tmp_path):
    settings = small_config(tiny_model_path, pairs, combine="modpo", loss={"name": "dpo", "beta": 0.3})
    plan = prepare(settings, registry.discover())
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    workshop = open_workshop(plan, tmp_path / "run", Observer(), keep_cache=False)
    history = run._settled(plan, tmp_path / "run", workshop)
    middle = Candidate("middle", Preference("weights", {"harmless": 0.5, "helpful": 0.5}))
    changed = [replace(outcome, changes={"loss.beta": 0.7}) for outcome in history]
    assert {frozen.beta for frozen in job_of(middle, workshop, history).margins_from.values()} == {0.3}
    assert {frozen.beta for frozen in job_of(middle, workshop, changed).margins_from.values()} == {0.7}
    with pytest.raises(TrainingError, match="has failed or is missing"):
        job_of(middle, workshop, [])
    assert isinstance(plan.objective, Objective)

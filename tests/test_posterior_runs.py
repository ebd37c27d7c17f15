"""Posteriors in runs: kept without a change to the training, combined for a preference, drawn, exported, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from interruptions import StopAfterSteps
from peft import PeftModel
from sweeps import contents, small_config, write_pairs
from transformers import AutoModelForCausalLM

import moalign
from moalign import config, lora, registry, storage
from moalign.engine import memory, snapshots
from moalign.engine.scoring import LogpCache
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import ConfigError, CorruptFileError, MoalignError, PluginError, RunError, UserError
from moalign.lora import mixing, posterior, posterior_file
from moalign.sweeps import together
from moalign.sweeps.archive import Archive
from moalign.sweeps.candidate import batch_source, job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference

STEPS, LAST = 9, 5  # half of 9 steps, rounded up
TRAIN = {"steps": STEPS, "pairs_per_step": 8, "lr": 1e-2, "together": 2}
MIDDLE, HELPFUL = "w-0.50-0.50", "w-0.00-1.00"
BETWEEN = {"helpful": 0.7, "harmless": 0.3}  # 0.4 of HELPFUL and 0.6 of MIDDLE
IDS = torch.arange(4, 44)[None]
FILE = "posterior.safetensors"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def directory(tiny_model_path, pairs, tmp_path_factory) -> Path:
    settings = small_config(tiny_model_path, pairs, train=TRAIN | {"posterior": 0.5})
    return moalign.sweep(settings, tmp_path_factory.mktemp("runs") / "run").directory


@pytest.fixture
def copy(directory, tmp_path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "run"))


def sealed(folder: Path) -> None:
    """As somebody may have done who changes a candidate's folder: under a manifest of its own."""
    (folder / "MANIFEST.json").unlink()
    storage.write_manifest(folder)


def kept(directory: Path, candidate: str) -> posterior.Posterior:
    adapter = mixing.read(directory / "candidates" / candidate)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    return posterior_file.read(directory / "candidates" / candidate, shapes, adapter.base)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def loaded_tensors(directory: Path, **way: Any) -> dict[str, torch.Tensor]:
    model, _ = moalign.open_run(directory).load(**way)
    return lora.weights(model, "default")


def largest(one: dict[str, torch.Tensor], other: Any) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


# --- in training ----------------------------------------------------------------------------------------------------


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
    settings = small_config(tiny_model_path, pairs, train=TRAIN | {"posterior": 0.5})
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


def test_interrupted_and_resumed_has_the_same_posteriors(tiny_model_path, pairs, directory, tmp_path):
    settings = small_config(tiny_model_path, pairs, train=TRAIN | {"posterior": 0.5})
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
        ({"train": {"steps": 6, "posterior": 0.1}}, r"train\.posterior: of 6 steps this is one, .* no deviation"),
        ({"train": {"posterior": 0.5, "early_stop": {}}}, r"train\.posterior: with train\.early_stop the last steps"),
        ({"train": {"posterior": 0}}, r"train\.posterior: .*greater than 0"),
        ({"train": {"posterior": 1.1}}, r"train\.posterior: .*less than or equal to 1"),
        (
            {"train": TRAIN | {"posterior": 0.5}, "condition": "prompt-text"},
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
    with pytest.raises(ConfigError, match=r"train\.posterior: of 2 steps this is one"):
        workshop.plan.variant({"train.steps": 2})


# --- for a preference -----------------------------------------------------------------------------------------------


def test_at_a_trained_preference_and_no_mass_it_is_the_mean_of_that_posterior(directory):
    mean = kept(directory, MIDDLE).mean
    for way in ({"candidate": MIDDLE}, {"prefer": "equal"}, {"helpful": 0.5, "harmless": 0.5}):
        found = loaded_tensors(directory, posterior=0.0, **way)
        assert all(torch.equal(found[name], tensor) for name, tensor in mean.items())
    own = mixing.read(directory / "candidates" / MIDDLE).tensors
    assert largest(dict(own), mean) > 1e-3  # the adapter is the last iterate, and not their mean


def test_between_trained_ones_it_is_the_convex_combination(directory):
    """Means and deviations by hand; the draw lies within, has the rank of the run, and is where the seed says."""
    parts = [kept(directory, name) for name in (HELPFUL, MIDDLE)]
    mean = {n: 0.4 * parts[0].mean[n].double() + 0.6 * parts[1].mean[n].double() for n in parts[0].mean}
    spread = {n: 0.4 * parts[0].deviation[n].double() + 0.6 * parts[1].deviation[n].double() for n in mean}
    assert largest(loaded_tensors(directory, posterior=0, **BETWEEN), mean) < 1e-6
    drawn = loaded_tensors(directory, posterior=0.5, draw=3, **BETWEEN)
    width = 0.6744897501960817  # of the quartiles
    places = []
    for name, tensor in drawn.items():
        assert tensor.shape == mean[name].shape
        away = tensor.double() - mean[name]
        assert bool((away.abs() <= width * spread[name] + 1e-6).all())
        large = spread[name] > 1e-4  # where rounding to float32 is nothing beside it
        places.append((away / (width * spread[name]))[large])
    every = torch.cat(places)
    assert (
        len(every) > 1000 and abs(float(every.mean())) < 0.1 and float(every.std()) == pytest.approx(3**-0.5, abs=0.03)
    )


def test_two_seeds_draw_two_adapters_and_one_seed_one(directory):
    run = moalign.open_run(directory)
    first, again, other, plain = (
        logits(run.load(**way, **BETWEEN)[0])
        for way in ({"posterior": 0.9}, {"posterior": 0.9, "draw": 0}, {"posterior": 0.9, "draw": 1}, {})
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3) and not torch.allclose(first, plain, atol=1e-3)


def test_what_is_exported_loads_with_plain_peft_and_says_what_it_is(directory, tiny_model_path, tmp_path):
    run = moalign.open_run(directory)
    expected = logits(run.load(posterior=0.5, draw=2, **BETWEEN)[0])
    run.export(tmp_path / "adapter", posterior=0.5, draw=2, **BETWEEN)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
    attached = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(attached), expected) and attached.peft_config["default"].r == 4
    note = storage.read_json(tmp_path / "adapter" / "moalign.json")
    assert note["draw"] == {"mass": 0.5, "seed": 2} and note["shares"] == pytest.approx({HELPFUL: 0.4, MIDDLE: 0.6})
    assert not (tmp_path / "adapter" / FILE).exists()
    run.export(tmp_path / "merged", posterior=0.5, draw=2, merge=True, **BETWEEN)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    run.export(tmp_path / "small", posterior=0.5, draw=2, rank=2, **BETWEEN)
    small = storage.read_json(tmp_path / "small" / "moalign.json")
    assert small["r"] == 2 and 0 < small["lost_to_rank"] < 1
    run.export(tmp_path / "mixed", **BETWEEN)
    assert storage.read_json(tmp_path / "mixed" / "moalign.json")["draw"] is None


def moalign_says(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moalign", *map(str, arguments)], capture_output=True, text=True)


def test_the_commands_draw_as_python_does(directory, tmp_path):
    how = ["--prefer", "helpful=0.7,harmless=0.3", "--posterior", "0.5", "--draw", "2"]
    done = moalign_says("export", directory, *how, "--to", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert f"draw 2 within mass 0.5 of the posterior 0.4 of {HELPFUL} + 0.6 of {MIDDLE}" in done.stderr
    written = storage.read_tensors(tmp_path / "adapter" / lora.WEIGHTS_FILE)
    assert largest(written, loaded_tensors(directory, posterior=0.5, draw=2, **BETWEEN)) == 0.0
    done = moalign_says("generate", directory, *how, "--prompt", "q1: ", "--max-new-tokens", 4, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["posterior"], row["draw"]) == (0.5, 2) and row["adapters"] == pytest.approx({HELPFUL: 0.4, MIDDLE: 0.6})
    for command, said in (
        (["generate", directory, *how, "--decoder", "multi-objective"], "--posterior: a decoder hears"),
        (["export", directory, "--bundle", "--to", tmp_path / "b", "--posterior", "0"], "--bundle writes the adapters"),
    ):
        done = moalign_says(*command)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_the_mean_is_said_to_be_it(directory):
    archive = Archive.open(directory)
    assert archive.drawn(archive.of_candidate(MIDDLE), 0, None).text == f"the mean of the posterior 1 of {MIDDLE}"


# --- what cannot be had ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"posterior": 1.0}, "posterior 1.0: a probability from 0"),
        ({"posterior": -0.5}, "posterior -0.5: a probability from 0"),
        ({"posterior": float("nan")}, "posterior nan: a probability from 0"),
        ({"draw": 3}, "draw 3: say from how much of the posterior"),
    ],
)
def test_a_draw_from_nothing_or_without_bounds_is_refused(directory, way, message):
    with pytest.raises(UserError, match=message):
        moalign.open_run(directory).load(**way, **BETWEEN)


def test_a_run_without_posteriors_says_how_to_get_them(small_run):
    with pytest.raises(RunError, match=r"trained without a posterior; train them with train\.posterior, such as 0\.25"):
        moalign.open_run(small_run).load(posterior=0.1, **BETWEEN)


def test_a_mixed_candidate_has_none_and_its_preference_is_had_from_the_trained_ones(tiny_model_path, pairs, tmp_path):
    search = {"name": "soup", "points": 3, "trained": 2}
    settings = small_config(tiny_model_path, pairs, search=search, train=TRAIN | {"posterior": 0.5})
    run = moalign.sweep(settings, tmp_path / "run")
    (mixed,) = [outcome.id for outcome in Archive.open(run.directory).history if outcome.kind == "mixed"]
    with pytest.raises(RunError, match=f"the candidate '{mixed}' was not trained but mixed"):
        run.load(mixed, posterior=0.1)
    parts = [kept(run.directory, name).mean for name in (HELPFUL, "w-1.00-0.00")]
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    assert largest(loaded_tensors(run.directory, prefer="equal", posterior=0), mean) < 1e-6


def test_a_conditioned_run_is_asked_without(copy):
    record = storage.read_json(copy / "run.json")
    record["config"] |= {"condition": {"name": "prompt-text"}}
    storage.write_json(copy / "run.json", record)
    archive = Archive.open(copy)
    with pytest.raises(RunError, match="its one model knows every preference itself"):
        archive.drawn(archive.of_candidate(MIDDLE), 0.1, None)


def test_candidates_of_another_scaling_are_not_combined(copy):
    folder = copy / "candidates" / MIDDLE
    storage.write_json(
        folder / "adapter_config.json", storage.read_json(folder / "adapter_config.json") | {"lora_alpha": 4.0}
    )
    sealed(folder)
    with pytest.raises(RunError, match=f"{MIDDLE}: its rank, scaling or targets are not those of {HELPFUL}"):
        moalign.open_run(copy).load(posterior=0.1, **BETWEEN)


def flipped(folder: Path) -> None:
    data = bytearray((folder / FILE).read_bytes())
    data[-5] ^= 1
    (folder / FILE).write_bytes(data)


def another(folder: Path) -> None:
    shutil.copy(folder.parent / "w-1.00-0.00" / FILE, folder / FILE)


def gone(folder: Path) -> None:
    (folder / FILE).unlink()


def rewritten(**changes: Any):
    def change(folder: Path) -> None:
        tensors, metadata = storage.read_tensors(folder / FILE), storage.read_metadata(folder / FILE)
        name = sorted(name for name in tensors if name.startswith("deviation/"))[0]
        if "base" in changes:
            metadata["base"] = changes["base"]
        elif changes["value"] is None:
            del tensors[name]
        elif changes["value"] == "more":
            tensors["third/thing"] = torch.zeros(2)
        else:
            tensors[name].view(-1)[0] = changes["value"]
        storage.write_tensors(folder / FILE, tensors, metadata)

    return change


@pytest.mark.parametrize("resealed", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (flipped, CorruptFileError, "does not match its checksum"),
        (another, CorruptFileError, "not the posterior of the adapter beside it"),
        (gone, RunError, "cannot read"),
        (rewritten(base="0" * 64), RunError, "trained on another base model"),
        (rewritten(value=-1.0), CorruptFileError, "numbers that are none"),
        (rewritten(value=float("nan")), CorruptFileError, "numbers that are none"),
        (rewritten(value="more"), CorruptFileError, "more than means and deviations"),
        (rewritten(value=None), CorruptFileError, "its tensors are not those of the adapter"),
    ],
)
def test_a_posterior_that_is_not_the_written_one_is_refused(copy, change, error, message, resealed):
    """Whether or not the folder's manifest was made to agree."""
    folder = copy / "candidates" / MIDDLE
    change(folder)
    if resealed:
        sealed(folder)
    with pytest.raises(error if resealed else MoalignError, match=message if resealed else FILE) as caught:
        moalign.open_run(copy).load(posterior=0.1, **BETWEEN)
    assert str(folder / FILE) in str(caught.value)


def test_a_search_that_wants_steps_too_few_for_it_is_told(tiny_model_path, pairs):
    class Short(moalign.api.Search):
        def propose(self, space, history, rng):
            wanted = Preference("weights", {"harmless": 0.5, "helpful": 0.5})
            return [] if history else [Candidate("short", wanted, changes={"train.steps": 1})]

    plan = prepare(small_config(tiny_model_path, pairs, train=TRAIN | {"posterior": 0.5}), registry.discover())
    with pytest.raises(PluginError, match=r"with changes that do not work: changes:\ntrain\.posterior: of 1 steps"):
        replace(plan, search=Short()).propose(())

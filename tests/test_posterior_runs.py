"""Posteriors of a run: combined for a preference, drawn, exported, and refused where they are not what was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch
from peft import PeftModel
from posteriors import FILE, HARMLESS, HELPFUL, KEEPING, MIDDLE, kept, largest
from sweeps import small_config, write_pairs
from transformers import AutoModelForCausalLM

import moalign
from moalign import lora, storage
from moalign.errors import CorruptFileError, MoalignError, RunError, UserError
from moalign.lora import mixing
from moalign.sweeps.archive import Archive

BETWEEN = {"helpful": 0.7, "harmless": 0.3}  # 0.4 of HELPFUL and 0.6 of MIDDLE
IDS = torch.arange(4, 44)[None]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="module")
def directory(tiny_model_path, pairs, tmp_path_factory) -> Path:
    settings = small_config(tiny_model_path, pairs, train=KEEPING)
    return moalign.sweep(settings, tmp_path_factory.mktemp("runs") / "run").directory


@pytest.fixture
def copy(directory, tmp_path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "run"))


def sealed(folder: Path) -> None:
    """As somebody may have done who changes a candidate's folder: under a manifest of its own."""
    (folder / "MANIFEST.json").unlink()
    storage.write_manifest(folder)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def loaded_tensors(directory: Path, **way: Any) -> dict[str, torch.Tensor]:
    model, _ = moalign.open_run(directory).load(**way)
    return lora.weights(model, "default")


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


def test_adapted_embeddings_are_combined_too(tiny_model_path, pairs, tmp_path):
    """Which mixing refuses: it has no delta of theirs to sum."""
    model = {"path": str(tiny_model_path), "lora": {"r": 2, "alpha": 4, "targets": ["embed_tokens", "q_proj"]}}
    train = {"steps": 2, "pairs_per_step": 4, "lr": 1e-2, "together": 1, "posterior": 1.0}
    settings = small_config(tiny_model_path, pairs, model=model, search={"name": "grid", "points": 2}, train=train)
    run = moalign.sweep(settings, tmp_path / "run")
    found = loaded_tensors(run.directory, prefer="equal", posterior=0)
    parts = [kept(run.directory, name) for name in (HELPFUL, HARMLESS)]
    assert any("embedding" in name for name in found)
    assert largest(found, {name: (parts[0].mean[name] + parts[1].mean[name]) / 2 for name in found}) < 1e-7


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


def test_the_commands_draw_as_python_does(directory, tmp_path):
    how = ["--prefer", "helpful=0.7,harmless=0.3", "--posterior", "0.5", "--draw", "2"]
    done = command_line.moalign("export", directory, *how, "--to", tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert f"draw 2 within mass 0.5 of the posterior 0.4 of {HELPFUL} + 0.6 of {MIDDLE}" in done.stderr
    written = storage.read_tensors(tmp_path / "adapter" / lora.WEIGHTS_FILE)
    assert largest(written, loaded_tensors(directory, posterior=0.5, draw=2, **BETWEEN)) == 0.0
    done = command_line.moalign("generate", directory, *how, "--prompt", "q1: ", "--max-new-tokens", 4, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["posterior"], row["draw"]) == (0.5, 2) and row["adapters"] == pytest.approx({HELPFUL: 0.4, MIDDLE: 0.6})
    for command, said in (
        (["generate", directory, *how, "--decoder", "multi-objective"], "--posterior: a decoder hears"),
        (["export", directory, "--bundle", "--to", tmp_path / "b", "--posterior", "0"], "--bundle writes the adapters"),
    ):
        done = command_line.moalign(*command)
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
    settings = small_config(tiny_model_path, pairs, search=search, train=KEEPING)
    run = moalign.sweep(settings, tmp_path / "run")
    (mixed,) = [outcome.id for outcome in Archive.open(run.directory).history if outcome.kind == "mixed"]
    with pytest.raises(RunError, match=f"the candidate '{mixed}' was not trained but mixed"):
        run.load(mixed, posterior=0.1)
    parts = [kept(run.directory, name).mean for name in (HELPFUL, HARMLESS)]
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
    shutil.copy(folder.parent / HARMLESS / FILE, folder / FILE)


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

"""Runs whose loss owns parameters: a value head that is kept, resumed and handed on with its candidate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import StopAfterSteps, break_off_and_resume, kill_and_resume
from safetensors.torch import load_file
from sweeps import contents
from value_heads import CANDIDATES, NAMES, STEPS, errors_of, settings_of, trained, write_prompts

from moalign import lora, registry, storage
from moalign.config import Config
from moalign.engine import owned
from moalign.engine.trainee import Trainee
from moalign.errors import ConfigError, TrainingError
from moalign.sweeps import run
from moalign.sweeps.candidate import batch_source, job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate

HEAD = {"value.bias": [1], "value.weight": [32]}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.fixture(scope="module")
def settings(tiny_model_path, prompts) -> Config:
    return settings_of(tiny_model_path, prompts)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, settings) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "unbroken"
    run.start(settings, directory, registry.discover(), Observer())
    return directory


def test_the_head_lies_beside_the_adapter_and_in_the_manifest(unbroken):
    folders = sorted((unbroken / "candidates").iterdir())
    heads = [load_file(folder / owned.FILE) for folder in folders]
    assert len(heads) == 3
    for folder, head in zip(folders, heads, strict=True):
        assert {name: list(value.shape) for name, value in head.items()} == HEAD
        assert all(value.dtype == torch.float32 and bool(value.any()) for value in head.values())
        assert owned.FILE in storage.read_json(folder / "MANIFEST.json")["files"]
        assert storage.verify(folder) == []
    assert not torch.equal(heads[0]["value.weight"], heads[1]["value.weight"])


def test_the_values_figures_are_among_the_metrics(unbroken):
    lines = [json.loads(line) for line in (unbroken / "candidates/w-1.00-0.00/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    assert [line["loss/value"] == 0 for line in lines] == [step < 3 for step in range(STEPS)]
    assert lines[0]["loss/explained_variance"] == 0 != lines[-1]["loss/explained_variance"]
    assert {"signal", "advantage", "kl_sampled"} <= set(lines[0])


def test_interrupted_and_resumed_equals_unbroken_byte_for_byte(settings, unbroken, tmp_path):
    break_off_and_resume(settings, tmp_path / "run", StopAfterSteps(9))
    found = contents(tmp_path / "run")
    assert found == contents(unbroken)
    assert sum(name.endswith(owned.FILE) for name in found) == 3


def test_sigkill_in_the_middle_and_resume(settings, unbroken, tmp_path):
    assert contents(kill_and_resume(settings, tmp_path)) == contents(unbroken)


# --- a parent's head --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workshop(settings) -> Workshop:
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


def child_of(workshop: Workshop, parent: Path, **changes: Any) -> Trainee:
    candidate = Candidate("next", CANDIDATES[1].preference, changes=changes)
    job = job_of(candidate, workshop, ())
    job = replace(job, settings=job.settings.model_copy(update={"lr": 0.0}))
    source = batch_source(candidate, workshop, NAMES[0])
    return Trainee(job, source, NAMES[0], lambda step, metrics: None, parent)


def test_training_from_a_parent_begins_with_its_head(unbroken, workshop):
    parent = unbroken / "candidates/w-0.50-0.50"
    trainee = child_of(workshop, parent)
    trained(workshop, [trainee])
    written = storage.read_tensors(parent / owned.FILE)
    assert trainee.owned.keys() == written.keys()
    assert all(torch.equal(value, written[name]) for name, value in trainee.owned.items())


def test_a_parent_without_a_head_gives_first_values(unbroken, workshop, tmp_path):
    parent = unbroken / "candidates/w-0.50-0.50"
    for name in (lora.WEIGHTS_FILE, lora.CONFIG_FILE):
        (tmp_path / name).write_bytes((parent / name).read_bytes())
    trainee = child_of(workshop, tmp_path)
    trained(workshop, [trainee])
    assert all(not value.any() for value in trainee.owned.values())


def test_a_head_that_does_not_fit_is_refused(unbroken, workshop, tmp_path):
    parent = unbroken / "candidates/w-0.50-0.50"
    for name in (lora.WEIGHTS_FILE, lora.CONFIG_FILE):
        (tmp_path / name).write_bytes((parent / name).read_bytes())
    owned.write(tmp_path, {"value.weight": torch.zeros(31)}, workshop.model.fingerprint)
    with pytest.raises(TrainingError, match=r"objective\.safetensors: it holds .*\[31\].* and the loss owns .*\[32\]"):
        _ = errors_of(workshop, child_of(workshop, tmp_path)).result
    owned.write(tmp_path, {"value.weight": torch.zeros(32)}, "another")
    with pytest.raises(TrainingError, match="trained with another base model"):
        _ = errors_of(workshop, child_of(workshop, tmp_path)).result


def test_warm_starts_of_a_sweep_go_on_with_the_head(tiny_model_path, prompts, tmp_path):
    """The values of its first round are those of its parent's last head, not nothing."""
    search = {"name": "grid", "points": 5, "warm_start": "neighbour", "warm_steps": 0.5}
    run.start(settings_of(tiny_model_path, prompts, search=search), tmp_path / "run", registry.discover(), Observer())
    lines = {
        folder.name: json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        for folder in sorted((tmp_path / "run/candidates").iterdir())
    }
    assert {name for name, line in lines.items() if line["loss/value"] != 0} == {"w-0.25-0.75", "w-0.75-0.25"}


# --- combiners ------------------------------------------------------------------------------------------------------


def test_rules_that_read_inner_products_of_gradients_are_refused(tiny_model_path, prompts):
    with pytest.raises(ConfigError, match=r"'dynamic-gradient' reads inner products .* loss 'ppo' weighs each token"):
        prepare(settings_of(tiny_model_path, prompts, combine="dynamic-gradient"), registry.discover())

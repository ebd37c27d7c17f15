"""Losses on sampled responses from one line of a configuration, on the model that comes with moalign: alone, broken off
and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from interruptions import StopAfterSteps
from sweeps import contents

from moalign import config, registry
from moalign.config import Config
from moalign.sweeps import front, run
from moalign.sweeps.observe import Observer

LOSSES: list[Any] = ["p3o", "chi-squared", "drpo", "asymmetric-apo", "rapo", "superhf", "distribution-matching", "kdrl"]
PLAIN: list[Any] = ["reinforce", "rloo", "remax", "grpo", "gspo", "ppo"]  # broken off and resumed in files of their own


def settings_of(loss: Any) -> Config:
    rewards = {name: {"reward": {"name": "tiny-assistant", "objective": name}} for name in ("harmless", "helpful")}
    return config.from_mapping(
        {
            "model": {"path": "tiny-assistant", "lora": {"r": 4, "alpha": 8}},
            "objectives": rewards,
            "data": {"path": "tiny-assistant"},
            "rollouts": {"rounds": 2, "samples": 3, "prompts": 4, "prompts_per_step": 4, "max_new_tokens": 12},
            "search": {"name": "grid", "points": 2},
            "train": {"steps": 4, "lr": 2e-3, "together": 1},
            "evaluate": {"samples": 2, "max_new_tokens": 12},
            "loss": loss,
        }
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """The folder of an adapter that has been trained before."""
    directory = tmp_path_factory.mktemp("runs") / "teacher"
    run.start(settings_of("rloo"), directory, registry.discover(), Observer())
    return sorted((directory / "candidates").iterdir())[0]


def name_of(loss: Any) -> str:
    return loss if isinstance(loss, str) else loss["name"]


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_one_line_trains_and_what_was_broken_off_goes_on_bit_for_bit(loss, teacher, tmp_path):
    if loss == "kdrl":
        loss = {"name": loss, "teacher": str(teacher), "masking": "response"}
    settings, registered = settings_of(loss), registry.discover()
    run.start(settings, tmp_path / "whole", registered, Observer())
    found = front.read(tmp_path / "whole")
    assert not found["failed"] and [point["kind"] for point in found["points"]] == ["trained"] * 2
    metrics = "".join(file.read_text() for file in (tmp_path / "whole" / "candidates").glob("*/metrics.jsonl"))
    assert any(json.loads(line)["gradient_norm"] > 0 for line in metrics.splitlines())
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, tmp_path / "parts", registered, StopAfterSteps(7))  # in the second candidate's second round
    run.resume(tmp_path / "parts", registered, Observer())
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("loss", PLAIN)
def test_one_line_trains(loss, tmp_path):
    found = run.start(settings_of(loss), tmp_path / "run", registry.discover(), Observer())
    assert not found["failed"] and [point["kind"] for point in found["points"]] == ["trained"] * 2

"""The reward `implicit-reward` against the sweep that trained the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from sweeps import small_config, write_pairs

from moalign import registry
from moalign.api import DataError, Sample
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign.testing import check_reward
from moalign_plugins.rewards.implicit_reward import ImplicitReward


@pytest.fixture(scope="module")
def trained(tiny_model_path, tmp_path_factory) -> tuple[Path, Path, dict[str, float]]:
    """The adapter, the held-out file, and what the sweep measured on it."""
    folder = tmp_path_factory.mktemp("trained")
    held_out = write_pairs(folder / "held_out.jsonl", prompts=4, seed=1)
    held_out.write_text(held_out.read_text().replace('"q', '"other '))
    settings = small_config(
        tiny_model_path,
        write_pairs(folder / "pairs.jsonl"),
        data={"path": str(folder / "pairs.jsonl"), "held_out_path": str(held_out)},
        search="listed",
        preferences={"lopsided": {"helpful": 0.9, "harmless": 0.1}},
        loss={"name": "dpo", "beta": 0.3},
    )
    (point,) = run.start(settings, folder / "run", registry.discover(), Observer())["points"]
    return folder / "run" / "candidates" / point["id"], held_out, point["details"]


def reward(adapter: Path, base: Path, **options) -> ImplicitReward:
    return ImplicitReward.model_validate(
        {"adapter": str(adapter), "base": str(base), "beta": 0.3, "device": "cpu"} | options
    )


@pytest.mark.parametrize("batch_size", [1, 5])
def test_it_is_the_margin_that_the_sweep_measured(tiny_model_path, trained, batch_size):
    adapter, held_out, details = trained
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    for objective in ("helpful", "harmless"):
        mine = [row for row in rows if row["objective"] == objective]
        better, worse = (
            reward(adapter, tiny_model_path, batch_size=batch_size).score(
                [Sample(row["prompt"], row[which]) for row in mine]
            )
            for which in ("chosen", "rejected")
        )
        margins = [one - other for one, other in zip(better, worse, strict=True) if one is not None]
        assert abs(margins[0]) > 1e-3
        assert sum(margins) / len(mine) == pytest.approx(details[f"{objective}/margin"], rel=1e-4, abs=1e-6)


def test_it_is_linear_in_beta_and_abstains_beyond_what_the_model_takes(tiny_model_path, trained):
    samples = [Sample("q: ", "abc"), Sample("q: ", "a" * 300), Sample("", "")]
    once, twice = (reward(trained[0], tiny_model_path, beta=beta).score(samples) for beta in (1.0, 2.0))
    assert once[1] is None and twice[1] is None
    assert twice[0] == 2 * once[0] and twice[2] == 2 * once[2] != 0


def test_it_conforms(tiny_model_path, trained):
    check_reward(reward(trained[0], tiny_model_path))


def test_what_it_refuses(tiny_model_path, trained, tmp_path):
    with pytest.raises(ValidationError, match=r"adapter_config\.json"):
        reward(tmp_path, tiny_model_path)
    with pytest.raises(ValidationError, match=r"config\.json"):
        reward(trained[0], tmp_path)
    with pytest.raises(DataError, match="chat template"):
        reward(trained[0], tiny_model_path).score([Sample(({"role": "user", "content": "q"},), "a")])

"""`moalign init FILE --recipe dpa`: one model that reads the preference, and learns its own best answers to it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from moalign import config, recipes, registry
from moalign.api import Batch
from moalign.sweeps import front, run
from moalign.sweeps.observe import Observer
from moalign_plugins.objectives.rejection_sampling import RejectionSampling

SHORT = (
    "train.steps=4",
    "rollouts.rounds=2",
    "rollouts.prompts=4",
    "rollouts.prompts_per_step=4",
    "rollouts.samples=3",
    "search.points=2",
    "evaluate.samples=1",
)


def settings(*changes: str) -> config.Config:
    return config.from_mapping(yaml.safe_load(recipes.read("dpa")), changes)


def test_it_is_iterated_rejection_sampling_for_a_preference_in_the_prompt():
    wanted = settings()
    assert (wanted.condition.name, wanted.loss.name, wanted.combine.name) == (
        "prompt-text",
        "rejection-sampling",
        "linear",
    )
    assert wanted.rollouts is not None and wanted.rollouts.rounds > 1
    assert wanted.search.name == "grid" and wanted.objective_names == ("harmless", "helpful")


@pytest.mark.parametrize("angles", ["[0, 90]", "[-45, 45]"], ids=["more of both", "also less of one"])
def test_one_model_is_trained_and_asked(angles, tmp_path, monkeypatch):
    seen: list[Batch] = []
    plain = RejectionSampling.loss

    def looking(self, batch, terms):
        seen.append(batch)
        return plain(self, batch, terms)

    monkeypatch.setattr(RejectionSampling, "loss", looking)
    told = "name: prompt-text, written: tally, scale: 6, template: '{weights}; '"
    wanted = settings(*SHORT, "condition={" + told + f", angles: {angles}}}")
    run.start(wanted, tmp_path / "run", registry.discover(), Observer())
    points = front.read(tmp_path / "run")["points"]
    assert [point["kind"] for point in points] == ["trained", "conditioned", "conditioned"]
    lines = (tmp_path / "run" / "candidates" / "model" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(json.loads(line)["gradient_norm"] > 0 for line in lines)
    for batch in seen:
        vectors = batch.preference.numpy()
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)  # directions, not weights
        for group in batch.groups.unique():
            own = batch.groups == group
            counts = batch.advantages[own].tolist()
            assert sorted(counts) == [0.0] * (len(counts) - 1) + [float(len(counts))]
    negative = any(bool((batch.preference < 0).any()) for batch in seen)
    assert negative == (angles == "[-45, 45]")

"""The benchmark of bounds: its worlds, its two rules, its table."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import false_bounds
from benchmarks.small_worlds import PRICE, World, even


def test_in_the_worlds_the_tilted_policy_is_the_best_and_reaches_what_none_exceeds():
    world = World(3)
    for weights in even(4):
        best = world.tilted(weights)
        assert np.exp(best).sum(1) == pytest.approx(1.0)
        assert weights @ world.values(best) == pytest.approx(world.most(weights), rel=1e-12)
        for other in (world.tilted(weights, 0.8), world.tilted(weights, 1.2), world.collapsed(), world.reference):
            assert weights @ world.values(other) < world.most(weights)
    assert world.shares([world.tilted(weights) for weights in even(30)]).min() > 0.99
    assert world.values(world.reference) == pytest.approx(
        (np.exp(world.reference)[..., None] * world.rewards).sum(1).mean(0)
    )


def test_what_a_run_keeps_says_of_the_best_policy_what_it_is_worth():
    world, weights = World(4), np.array([0.3, 0.7])
    found = world.sampled(world.tilted(weights)).about(weights, PRICE)
    assert found is not None and found.deviation < 1e-9 and found.value == pytest.approx(world.most(weights), abs=1e-9)


def test_the_rules_differ_where_one_candidate_has_collapsed(tmp_path, capsys):
    mended = false_bounds.result("one says the same to everybody", 3, 4)
    assert mended["before_false"] >= 3 and mended["now_false"] == 0
    assert mended["before_beside"] < 1 < mended["now_beside"]
    good = false_bounds.result("near the best", 3, 4)
    assert good["before_false"] == good["now_false"] == 0 and 1 < good["before_beside"] <= good["now_beside"]


def test_the_table_is_written_beside_the_json(tmp_path, monkeypatch):
    monkeypatch.setattr(false_bounds, "CANDIDATES", {"near the best": false_bounds.CANDIDATES["near the best"]})
    false_bounds.main(worlds=1, output=tmp_path / "bounds.json")
    results = json.loads((tmp_path / "bounds.json").read_text())["results"]
    assert [each["points"] for each in results] == [3, 11]
    assert "| near the best | 3 | 1 | 0 | 0 |" in (tmp_path / "bounds.md").read_text()

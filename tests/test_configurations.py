"""Configurations of hyper-parameters side by side, from the points of a front alone."""

from __future__ import annotations

import io
from statistics import fmean, stdev
from typing import Any

import pytest
from rich.console import Console

from moalign import pareto
from moalign.report.configurations import configurations_table
from moalign.report.table import show_front
from moalign.sweeps.configurations import compare
from moalign.types import Outcome, Preference

OBJECTIVES = ("harmless", "helpful")
EQUAL = Preference("weights", dict.fromkeys(OBJECTIVES, 0.5))


def tried(name: str, *scores: float, status: Any = "done", kind: Any = "trained", parents: Any = None, **changes: Any):
    found = dict(zip(OBJECTIVES, scores, strict=True)) if scores else {}
    return Outcome(name, status, EQUAL, found, kind=kind, parents=parents or {}, changes=changes)


def compared(history: list[Outcome], seed: int = 5) -> list[dict[str, Any]]:
    return compare(history, {one.id: list(one.scores.values()) for one in history if one.scores}, [0, 0], seed)


STUDY = [
    tried("a", 1.0, 2.0, lr=1, seed=5),
    tried("b", 2.0, 1.0, lr=1, seed=5),
    tried("c", 3.0, 1.0, lr=1, seed=6),
    tried("d", 0.5, 0.5, lr=2, seed=5),
    tried("e", 0.5, 1.5, lr=2, seed=6),
    tried("f", 2.0, 2.0, lr=1, seed=7),
    tried("g", 1.0, 2.0, lr=1, seed=8),
    tried("h", 1.0, 1.0, seed=7),
    tried("i", 1.0, 3.0, seed=8),
]


def test_points_that_share_all_but_the_seed_are_one_configuration():
    first, second, own = compared(STUDY)
    assert first == {
        "changes": {"lr": 1},
        "seeds": [5, 6, 7, 8],
        "points": 5,
        "hypervolume": 3.0,  # 3 by two overlapping points, and 3 by one
        "stddev": 0.0,
        "held_out": 3.0,  # 4 and 2
        "held_out_stddev": pytest.approx(2**0.5),
    }
    assert second["hypervolume"] == pytest.approx(fmean([0.25, 0.75])) and second["held_out"] is None
    assert second["stddev"] == pytest.approx(stdev([0.25, 0.75]))
    assert own["changes"] == {} and own["hypervolume"] is None and own["held_out"] == 2.0


def test_all_points_of_a_seed_together_have_the_hypervolume_of_the_front():
    alone = [each for each in STUDY if each.changes == {"lr": 1, "seed": 5}]
    both = [*alone, tried("z", 1.0, 1.0, lr=3)]
    found, other = compared(both)
    assert found["hypervolume"] == pareto.hypervolume([list(each.scores.values()) for each in alone], [0, 0])
    assert found["stddev"] is None and other["seeds"] == [5]  # a point without a seed has the run's


def test_without_seeds_that_chose_nothing_none_are_held_out():
    same = [tried("a", 1, 1, lr=1, seed=1), tried("b", 2, 2, seed=1)]
    first, own = compared(same, 0)
    assert first["held_out"] is None and own["held_out"] is None and own["hypervolume"] == 4


def test_seeds_are_held_out_by_what_was_proposed_whatever_became_of_it():
    """The budget has cut the confirmation, or all of the configured one failed, or a whole tuning seed has."""
    tuned = [tried("a", 2, 2, lr=1, seed=0), tried("b", 2, 2, lr=1, seed=1), tried("c", 1, 1, lr=2, seed=0)]
    tuned += [tried("d", status="failed", lr=2, seed=1)]
    again = [tried("e", 1, 1, lr=1, seed=2), tried("f", 1, 1, lr=1, seed=3)]
    for status in ("skipped", "failed"):
        own = [tried("g", status=status, seed=2), tried("h", status=status, seed=3)]
        first, second, *rest = compared([*tuned, *again, *own], 0)
        assert (first["hypervolume"], first["held_out"]) == (4.0, 1.0)
        assert (second["hypervolume"], second["held_out"], second["points"]) == (0.5, None, 1), (
            "a seed that failed is 0"
        )
        assert [one["held_out"] for one in rest] == ([0.0] if status == "failed" else [])


def test_one_configuration_and_what_continues_or_mixes_it_is_no_comparison():
    grid = [
        tried("a", 1, 2),
        tried("b", 2, 1, seed=3),
        tried("c", 2, 2, parents={"a": 1.0}, steps=3),
        tried("d", 1, 1, kind="mixed", lr=2, parents={"a": 0.5, "b": 0.5}),
    ]
    assert compared(grid, 0) == [] == compared([])


def test_hypervolumes_by_group_are_those_of_the_groups():
    points = [[1, 1], [2, 1], [1, 3]]
    assert pareto.hypervolumes(points, ["x", "y", "x"], [0, 0]) == {"x": 3.0, "y": 2.0}
    assert list(pareto.hypervolumes(points, [2, 1, 2], [0, 0])) == [2, 1]
    assert pareto.hypervolumes([], [], [0, 0]) == {}
    with pytest.raises(ValueError, match="shorter"):
        pareto.hypervolumes(points, [1, 2], [0, 0])


def test_the_terminal_shows_the_best_confirmed_one_first():
    output = io.StringIO()
    Console(file=output, width=120).print(configurations_table(compared(STUDY)))
    lines = [line for line in output.getvalue().splitlines() if "lr" in line or "configured" in line]
    assert [line.split("  ")[0].strip() for line in lines] == ["lr 1", "as configured", "lr 2"]
    assert "3.0 ± 1.4" in lines[0] and "held-out seeds chose" in output.getvalue()


def test_a_front_shows_them_only_where_there_are_several():
    front: dict[str, Any] = {
        "objectives": [{"name": name, "direction": "max"} for name in OBJECTIVES],
        "evaluation": "made up",
        "base": None,
        "failed": [],
        "reference_point": dict.fromkeys(OBJECTIVES, 0.0),
        "hypervolume": 1.0,
        "points": [
            {
                "id": each.id,
                "scores": each.scores,
                "kind": each.kind,
                "parents": each.parents,
                "changes": each.changes,
                "preference": {"kind": "weights", "values": {"harmless": 0.5, "helpful": 0.5}, "name": None},
                "stderr": {},
                "kl": None,
                "tokens": 1,
                "details": {},
                "dominated": False,
            }
            for each in STUDY
        ],
    }

    def shown() -> str:
        output = io.StringIO()
        show_front(front, Console(file=output, width=120))
        return output.getvalue()

    assert "Configurations" not in shown()
    front["configurations"] = compared(STUDY)
    assert "Configurations" in shown() and "as configured" in shown()

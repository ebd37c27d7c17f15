"""Hypervolume, contributions, knee, chance and attainment against inclusion-exclusion, enumeration and known cases."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from moalign import pareto
from moalign.errors import MoalignError

SETS = 100_000
SHAPES = [(points, objectives) for points in (1, 2, 3, 4, 5) for objectives in (2, 3, 4, 5)]


def volumes(sets: np.ndarray) -> np.ndarray:
    """Of sets [s,n,M] above 0, by inclusion-exclusion over all subsets of their points; exact for small integers."""
    total = np.zeros(len(sets))
    for size in range(1, sets.shape[1] + 1):
        for chosen in itertools.combinations(range(sets.shape[1]), size):
            total -= (-1.0) ** size * np.clip(sets[:, chosen].min(1), 0, None).prod(-1)
    return total


def random_sets(number: int, points: int, objectives: int, seed: int) -> np.ndarray:
    """Small integers, below the reference point as well: ties, duplicates and dominated points are everywhere."""
    return np.random.default_rng(seed).integers(-1, 4, (number, points, objectives)).astype(np.float64)


@pytest.mark.parametrize(("points", "objectives"), SHAPES)
def test_hypervolumes_of_100000_sets_are_those_of_inclusion_exclusion(points, objectives):
    sets = random_sets(SETS // len(SHAPES), points, objectives, seed=points * 10 + objectives)
    reference = np.zeros(objectives)
    assert [pareto.hypervolume(each, reference) for each in sets] == volumes(sets).tolist()


@pytest.mark.parametrize("objectives", (1, 2, 3, 4, 5))
def test_a_contribution_is_what_is_lost_without_the_point(objectives):
    sets = random_sets(400, 4, objectives, seed=objectives)
    whole = volumes(sets)
    lost = np.column_stack([whole - volumes(np.delete(sets, place, axis=1)) for place in range(4)])
    found = np.array([pareto.contributions(each, np.zeros(objectives)) for each in sets])
    assert np.array_equal(found, lost)


def test_no_copy_of_a_point_contributes():
    assert pareto.contributions([[2, 1], [2, 1], [1, 2], [0, 0]], [0, 0]).tolist() == [0, 0, 1, 0]
    assert pareto.contributions([[2, 3]], [0, 0]).tolist() == [6]
    assert pareto.contributions([], [0, 0]).tolist() == []
    with pytest.raises(MoalignError, match="row 0, objective 1 is nan"):
        pareto.contributions([[1, math.nan]], [0, 0])


def test_grids_are_even_and_never_too_large():
    for objectives in (1, 2, 3, 4, 5, 8, 24, 30):
        weights = np.array(pareto.grid(objectives))
        assert (
            len(weights) <= 300 and np.allclose(weights.sum(1), 1) and len(np.unique(weights, axis=0)) == len(weights)
        )
        assert all((weights == one).all(1).any() for one in np.eye(objectives)), "every objective alone is in it"
    assert len(pareto.grid(2)) == 21 and len(pareto.grid(3)) == 231


def test_points_differ_where_one_objective_does_beyond_its_error():
    one, other = [[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.27], [0.5, 1.0]]
    errors = [[0.1, 0.1], [0.1, 0.1]]  # 1.96 sqrt(2) 0.1 = 0.277
    assert pareto.differ(one, errors, other, errors).tolist() == [[False, True], [True, True]]
    none = np.zeros((2, 2))
    assert pareto.differ(one, none, one, none).tolist() == [[False, True], [True, False]]
    with pytest.raises(MoalignError, match="2 objectives, expected 1"):
        pareto.differ([[0.0]], [[0.0]], one, none)


def test_the_error_of_an_expected_utility_is_that_of_the_points_that_are_best():
    weights = pareto.grid(2)
    assert pareto.expected_utility_error([[1, 1]], [[0.2, 0.4]], weights) == pytest.approx(0.3)
    # (1, 0) is best for 11 of 21 weights, the tie among them goes to the first; the third never is
    found = pareto.expected_utility_error([[1, 0], [0, 1], [-1, -1]], [[0.1, 0], [0, 0.2], [9, 9]], weights)
    first = [w for w, _ in weights if w >= 0.5]
    assert found == pytest.approx((0.1 * sum(first) + 0.2 * sum(1 - w for w, _ in weights if w < 0.5)) / 21)


def test_the_error_covers_the_spread_of_expected_utilities():
    rng = np.random.default_rng(0)
    points, weights = np.array([[1.0, 0.0], [0.7, 0.7], [0.0, 1.0]]), pareto.grid(2)
    shared = rng.normal(size=(2000, 1, 2)) * 0.02  # of the prompts that all points are scored on
    found = [pareto.expected_utility(points + noise, weights) for noise in shared]
    claimed = pareto.expected_utility_error(points, np.full((3, 2), 0.02), weights)
    assert claimed > statistics.stdev(found) > 0.5 * claimed


@pytest.mark.parametrize("objectives", (1, 2, 3))
@pytest.mark.parametrize("runs", (1, 2, 3, 5, 6, 7))
def test_a_level_is_attained_by_so_many_runs_and_nothing_better_is(objectives, runs):
    rng = np.random.default_rng(runs)
    sets = [rng.integers(0, 5, (rng.integers(1, 5), objectives)).astype(float) for _ in range(runs)]
    levels = pareto.attainment(sets)
    assert levels is not None
    everywhere = np.array(list(itertools.product(range(-1, 6), repeat=objectives)), dtype=float)
    counts = sum(((each[None] >= everywhere[:, None]).all(-1).any(1)).astype(int) for each in sets)
    for level, wanted in (("worst", runs), ("median", (runs + 1) // 2), ("best", 1)):
        inside = (levels[level][None] >= everywhere[:, None]).all(-1).any(1)
        assert np.array_equal(inside, counts >= wanted), level
        assert pareto.non_dominated(levels[level]).all()


def test_attainment_refuses_what_it_cannot_say():
    assert pareto.attainment([np.zeros((2, 4))]) is None, "more than three objectives"
    for sets, reason in (([], "no sets"), ([[[1, 2]], []], "set 1: empty"), ([[[1, 2]], [[1]]], "set 1: 1 objectives")):
        with pytest.raises(MoalignError, match=reason):
            pareto.attainment(sets)
    with pytest.raises(MoalignError, match="set 0: row 0, objective 0 is nan"):
        pareto.attainment([[[math.nan, 1]]])


def test_bands():
    assert pareto.band([1.0, 3.0]) == {"mean": 2.0, "deviation": math.sqrt(2), "lowest": 1.0, "highest": 3.0}
    assert pareto.band([1.0])["deviation"] is None


def test_a_knee_needs_three_points_that_differ():
    assert pareto.knee_plane([[0, 1], [1, 0]]) is None and pareto.knee_plane([[0, 1], [0.5, 1], [1, 1]]) is None
    found = pareto.knee_plane([[0, 2], [1, 0], [0.5, 1.5]])
    assert found is not None
    normal, offset = found
    assert np.allclose(np.array([[0, 2], [1, 0]]) @ normal, offset) and np.dot([0.5, 1.5], normal) > offset

"""What mixtures reach, and the volumes of polytopes: exact cases, an exact recursion, counting, linear programmes."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linprog

from moalign import pareto
from moalign.errors import MoalignError
from moalign.pareto import mixtures


def area_of_mixtures(points: np.ndarray, reference: np.ndarray) -> float:
    """Two objectives: the area under the concave upper border of the points, cut off at the reference; exact."""
    shifted = [(Fraction(x), Fraction(y)) for x, y in (points - reference).tolist()]
    ends = sorted({(x, max(b for a, b in shifted if a >= x)) for x, _ in shifted} | {(-99, max(y for _, y in shifted))})
    border: list[tuple[Fraction, Fraction]] = []
    for x, y in ends:
        while len(border) > 1 and (border[-1][1] - border[-2][1]) * (x - border[-2][0]) <= (y - border[-2][1]) * (
            border[-1][0] - border[-2][0]
        ):
            border.pop()
        border.append((Fraction(x), y))
    total = Fraction(0)
    for (a, b), (c, d) in itertools.pairwise(border):
        slope = (d - b) / (c - a)
        left, right = max(a, Fraction(0)), c
        if slope < 0:  # where it falls below 0
            right = min(right, a - b / slope)
        if right > left:
            total += (right - left) * max(Fraction(0), b + slope * ((left + right) / 2 - a))
    return float(total)


def reached_by_mixtures(points: np.ndarray, places: np.ndarray) -> list[bool]:
    """For each place, whether some mixture is at least as good everywhere: t >= 0 in max t with mixture >= place + t,
    all places in one linear programme of as many blocks."""
    count, objectives = points.shape
    above = sparse.kron(sparse.identity(len(places)), np.hstack([-points.T, np.ones((objectives, 1))]), format="csr")
    shares = sparse.kron(sparse.identity(len(places)), np.append(np.ones(count), 0.0)[None], format="csr")
    result = linprog(
        np.tile(np.append(np.zeros(count), -1.0), len(places)),
        A_ub=above,
        b_ub=-places.reshape(-1),
        A_eq=shares,
        b_eq=np.ones(len(places)),
        bounds=([(0, None)] * count + [(None, None)]) * len(places),
    )
    assert result.status == 0
    return (result.x.reshape(len(places), -1)[:, -1] >= 0).tolist()


def counted(inside: list[bool], volume: float) -> tuple[float, float]:
    """A volume from uniform samples of a box of that volume, and four binomial standard errors of it."""
    share = sum(inside) / len(inside)
    return volume * share, 4 * volume * math.sqrt(max(share * (1 - share), 1 / len(inside)) / len(inside))


@pytest.mark.parametrize("size", (1, 2, 3, 6))
def test_areas_of_mixtures_are_exact(size):
    rng = np.random.default_rng(size)
    for _ in range(150):
        points, reference = rng.integers(-3, 5, (size, 2)).astype(float), rng.integers(-2, 2, 2).astype(float)
        found = pareto.hypervolume_of_mixtures(points, reference)
        assert found == pytest.approx(area_of_mixtures(points, reference), abs=1e-9), (points.tolist(), reference)
        assert found >= pareto.hypervolume(points, reference) - 1e-9


@pytest.mark.parametrize("objectives", (3, 4, 5))
@pytest.mark.parametrize("low", (0.0, -0.5))
def test_volumes_of_mixtures_agree_with_counting(objectives, low):
    rng = np.random.default_rng(objectives)
    points = rng.uniform(low, 1, (7, objectives))
    places = rng.uniform(0, 1, (1500, objectives))
    found, error = counted(reached_by_mixtures(points, places), 1.0)
    assert pareto.hypervolume_of_mixtures(points, np.zeros(objectives)) == pytest.approx(found, abs=error)


@pytest.mark.parametrize("objectives", (1, 2, 3, 4, 5))
def test_known_volumes_of_mixtures(objectives):
    corner, one = np.zeros(objectives), np.eye(objectives)
    assert pareto.hypervolume_of_mixtures(one, corner) == pytest.approx(1 / math.factorial(objectives))
    box = np.arange(1.0, objectives + 1)
    assert pareto.hypervolume_of_mixtures([box], corner) == pytest.approx(math.factorial(objectives))
    assert pareto.hypervolume_of_mixtures([box, box / 2, box], corner) == pytest.approx(math.factorial(objectives))
    assert pareto.hypervolume_of_mixtures([-box], corner) == 0 == pareto.hypervolume_of_mixtures([], corner)
    if objectives > 1:  # each below the reference, their mixtures are not: the simplex with sum M - (M - 1)
        wide = (objectives + 1) * one - np.ones((objectives, objectives))
        assert pareto.hypervolume_of_mixtures(wide, corner) == pytest.approx(1 / math.factorial(objectives))
        line = np.linspace(0, 1, 5)[:, None] * (one[0] - one[1]) + one[1]
        assert pareto.hypervolume_of_mixtures(line, corner) == pytest.approx(0.5 if objectives == 2 else 0)


def test_volumes_of_mixtures_move_and_scale_with_the_objectives():
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.2, 1, (6, 3))
    scale, shift = np.array([1e-3, 10.0, 1e4]), np.array([5.0, -1e3, 1e5])
    wanted = pareto.hypervolume_of_mixtures(points, np.zeros(3)) * scale.prod()
    assert pareto.hypervolume_of_mixtures(points * scale + shift, shift) == pytest.approx(wanted, rel=1e-6)


def test_mixtures_that_dominate_are_found_in_two_objectives_by_trying_all_pairs():
    rng = np.random.default_rng(1)
    for _ in range(120):
        points = rng.integers(0, 6, (rng.integers(1, 7), 2)).astype(float)
        assert pareto.mixture_dominated(points).tolist() == [by_pairs(points, point) for point in points]


def by_pairs(points: np.ndarray, point: np.ndarray) -> bool:
    """Whether some point between two others, or one of them, dominates; exactly."""
    others = [other for other in points.tolist() if other != point.tolist()]
    for a, b in itertools.product(others, repeat=2):
        low, high = Fraction(0), Fraction(1)
        for x, y, p in zip(a, b, point.tolist(), strict=True):
            rise, short = Fraction(y - x), Fraction(p - x)
            if rise == 0 and short > 0:
                low, high = Fraction(1), Fraction(0)
            elif rise > 0:
                low = max(low, short / rise)
            elif rise < 0:
                high = min(high, short / rise)
        for t in (low, high):
            if low <= high and any(x + t * Fraction(y - x) > p for x, y, p in zip(a, b, point.tolist(), strict=True)):
                return True
    return False


@pytest.mark.parametrize("objectives", (3, 4, 5))
def test_a_little_less_than_a_mixture_is_dominated_and_a_mixture_is_not(objectives):
    points = np.eye(objectives)
    middle = np.full(objectives, 1 / objectives)
    assert pareto.mixture_dominated([*points, middle]).tolist() == [False] * (objectives + 1)
    assert pareto.mixture_dominated([*points, middle - 1e-6]).tolist() == [False] * objectives + [True]
    assert not pareto.non_dominated([*points, middle - 1e-6])[:0].any()
    assert pareto.non_dominated([*points, middle - 1e-6]).all(), "no single point dominates it"


def test_copies_and_single_points_are_not_dominated_by_mixtures():
    assert pareto.mixture_dominated([[1, 1], [1, 1]]).tolist() == [False, False]
    assert pareto.mixture_dominated([[1, 2]]).tolist() == [False] and pareto.mixture_dominated([]).tolist() == []
    assert (
        pareto.mixture_dominated([[1, 0], [1, 0], [0, 1], [0.4, 0.4], [0.4, 0.4]]).tolist() == [False] * 3 + [True] * 2
    )
    with pytest.raises(MoalignError, match="row 1, objective 0 is inf"):
        pareto.mixture_dominated([[1, 1], [math.inf, 0]])


@pytest.mark.parametrize("objectives", (2, 3, 4, 5))
def test_volumes_of_polytopes_agree_with_counting(objectives):
    rng = np.random.default_rng(objectives)
    weights = np.vstack([np.eye(objectives), rng.dirichlet(np.ones(objectives), 5)])
    bounds, reference = np.linalg.norm(weights, axis=1), np.full(objectives, 0.1)
    places = rng.uniform(0.1, 1, (20_000, objectives))
    inside = (places @ weights.T <= bounds).all(1).tolist()
    found, error = counted(inside, 0.9**objectives)
    assert pareto.hypervolume_at_most(weights, bounds, reference) == pytest.approx(found, abs=error)


@pytest.mark.parametrize("objectives", (1, 2, 3, 4, 5))
def test_known_volumes_of_polytopes(objectives):
    one, corner, even = np.eye(objectives), np.zeros(objectives), np.full((1, objectives), 1 / objectives)
    volume = math.factorial(objectives)
    assert pareto.hypervolume_at_most(one, np.arange(1, objectives + 1), corner) == pytest.approx(volume)
    assert pareto.hypervolume_at_most(even, [1.0], corner) == pytest.approx(objectives**objectives / volume)
    # the unit cube without the corner above sum x = M - 1/2
    cut = pareto.hypervolume_at_most(np.vstack([one, even]), [1.0] * objectives + [1 - 0.5 / objectives], corner)
    assert cut == pytest.approx(1 - 0.5**objectives / volume)
    assert pareto.hypervolume_at_most(one, np.ones(objectives), np.ones(objectives)) == 0
    assert pareto.hypervolume_at_most(one, np.ones(objectives), np.full(objectives, 2.0)) == 0
    if objectives > 1:
        assert pareto.hypervolume_at_most(one[:1], [1.0], corner) is None
        assert pareto.hypervolume_at_most(one[:1], [-1.0], corner) == 0, "nothing is above the reference there"


def test_many_points_of_five_objectives_are_measured_and_more_objectives_are_left_out():
    rng = np.random.default_rng(0)
    points = rng.dirichlet(np.ones(5), 40)
    points = points / np.linalg.norm(points, axis=1, keepdims=True) + rng.normal(size=points.shape) * 0.05 - 0.05
    places = rng.uniform(0, 0.9, (1500, 5))
    found, error = counted(reached_by_mixtures(points, places), 0.9**5)
    assert pareto.hypervolume_of_mixtures(points, np.zeros(5)) == pytest.approx(found, abs=error)
    weights = np.vstack([np.eye(6), rng.dirichlet(np.ones(6), 20)])
    assert pareto.hypervolume_of_mixtures(weights, np.zeros(6)) is None
    assert pareto.hypervolume_at_most(weights, np.linalg.norm(weights, axis=1), np.zeros(6)) is None


@pytest.mark.parametrize("objectives", (2, 3, 5))
def test_a_point_that_is_best_for_some_weights_is_passed_as_the_linear_programme_passes_it(objectives, monkeypatch):
    rng = np.random.default_rng(objectives)
    points = rng.uniform(0, 1, (25, objectives)) ** 0.5
    quick = pareto.mixture_dominated(points).tolist()
    asked = []
    surplus = mixtures._surplus
    monkeypatch.setattr(mixtures, "_best", lambda scaled, distinct: np.zeros(len(scaled), dtype=bool))
    monkeypatch.setattr(mixtures, "_surplus", lambda *which: asked.append(which) or surplus(*which))
    assert pareto.mixture_dominated(points).tolist() == quick
    assert len(asked) == pareto.non_dominated(points).sum()

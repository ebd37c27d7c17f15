"""Riesz energy and Sobol: weights that lie on the simplex, evenly, any number of them."""

from __future__ import annotations

import re
from itertools import combinations
from math import dist
from random import Random

import numpy as np
import pytest
from pydantic import ValidationError

from moalign.api import ConfigError, Outcome, Space
from moalign_plugins.searches.random import Random as Drawn
from moalign_plugins.searches.riesz import Riesz, directions
from moalign_plugins.searches.sobol import Sobol, gaps

NAMES = ("concise", "fluent", "harmless", "helpful", "polite")


def points(search, objectives: int, seed: int = 0) -> np.ndarray:
    """[n,M]"""
    space = Space(NAMES[:objectives])
    return np.array([each.preference.vector(space.objectives) for each in search.propose(space, (), Random(seed))])


def nearest(rows: np.ndarray) -> float:
    return min(dist(one, other) for one, other in combinations(rows.tolist(), 2))


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5])
def test_riesz_weights_are_on_the_simplex_with_each_objective_alone_first(objectives):
    for number in (objectives, objectives + 1, 13):
        rows = points(Riesz(points=number), objectives)
        assert rows.shape == ((number, objectives) if objectives > 1 else (1, 1))
        assert (rows >= 0).all() and np.abs(rows.sum(axis=1) - 1).max() <= 2**-52
        assert (rows[:objectives] == np.eye(objectives)).all()
        assert len({tuple(row) for row in rows.tolist()}) == len(rows)
        assert (points(Riesz(points=number), objectives, seed=5) == rows).all()  # the run's seed plays no part


def test_riesz_for_two_objectives_is_even():
    for number in (2, 3, 7, 10, 24):
        rows = sorted(points(Riesz(points=number), 2)[:, 0].tolist())
        assert rows == pytest.approx(np.linspace(0, 1, number), abs=1e-12)


def test_riesz_finds_the_lattice_where_that_is_the_best():
    """Six points of three objectives: corners, and the middles of the edges."""
    rows = points(Riesz(points=6), 3)
    lattice = [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    assert np.abs(rows[3:] - np.array(lattice)).max() < 5e-2


@pytest.mark.parametrize(("objectives", "number"), [(3, 12), (4, 14), (5, 17)])
def test_riesz_is_more_even_than_chance(objectives, number):
    """Least distances and the energy itself, against the best of twenty random draws of as many."""
    rows = points(Riesz(points=number), objectives)
    drawn = [points(Drawn(count=number), objectives, seed) for seed in range(20)]

    def energy(rows: np.ndarray) -> float:
        return sum(dist(one, other) ** (-2 * objectives) for one, other in combinations(rows.tolist(), 2))

    assert nearest(rows) > max(map(nearest, drawn))
    assert energy(rows) < min(map(energy, drawn))


def test_another_start_may_find_other_points_and_the_same_start_never_does():
    directions.cache_clear()
    first = directions(3, 9, 0)
    directions.cache_clear()
    assert directions(3, 9, 0) == first
    assert directions(3, 9, 1)[:3] == first[:3]


def test_fewer_points_than_objectives_are_refused():
    with pytest.raises(ConfigError, match=r"points: 2 cannot hold one candidate per objective; 3 objectives need"):
        points(Riesz(points=2), 3)
    for bad in (0, 2**17):
        with pytest.raises(ValidationError):
            Sobol(count=bad)


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
def test_sobol_weights_are_on_the_simplex_and_more_of_them_keep_the_first(objectives):
    rows = points(Sobol(count=70), objectives)
    assert (rows >= 0).all() and np.abs(rows.sum(axis=1) - 1).max() <= 1e-12
    assert len(rows) == (70 if objectives > 1 else 1)
    for fewer in (1, 2, 9, 64):
        assert (points(Sobol(count=fewer), objectives) == rows[:fewer]).all()
    if objectives > 1:
        assert (points(Sobol(count=70), objectives, seed=1) != rows).any()


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_sobol_weights_are_uniform_on_the_simplex(objectives):
    """Each is Beta(1, M-1), each two have the covariance of the uniform distribution; better than chance could."""
    number, m = 4096, objectives
    rows = points(Sobol(count=number), m)
    assert rows.mean(axis=0) == pytest.approx(1 / m, abs=0.1 * number**-0.5)
    variance = (m - 1) / (m * m * (m + 1))
    assert rows.var(axis=0) == pytest.approx(variance, rel=0.01)
    for one, other in combinations(range(m), 2):
        assert np.cov(rows[:, one], rows[:, other])[0, 1] == pytest.approx(-1 / (m * m * (m + 1)), rel=0.05)
    for level in (0.1, 0.3, 0.7):  # P(w <= x) = 1 - (1 - x)^(M-1)
        assert (rows <= level).mean(axis=0) == pytest.approx(1 - (1 - level) ** (m - 1), abs=0.3 * number**-0.5)


def test_sobol_for_two_objectives_has_one_point_in_each_of_equal_parts():
    for power in range(1, 8):
        number = 2**power
        first = points(Sobol(count=number), 2, seed=power)[:, 0]
        assert sorted(np.floor(first * number).astype(int)) == list(range(number))


def test_gaps_keep_volumes():
    """The map is linear on each order of the coordinates, with determinant 1 or -1."""
    rng = Random(0)
    for m in (2, 3, 4):
        point = [rng.random() for _ in range(m - 1)]
        step = 1e-4
        columns = []
        for axis in range(m - 1):
            moved = [value + step * (axis == place) for place, value in enumerate(point)]
            columns.append([(a - b) / step for a, b in zip(gaps(moved)[:-1], gaps(point)[:-1], strict=True)])
        assert abs(np.linalg.det(np.array(columns))) == pytest.approx(1)
    assert gaps([0.7, 0.2]) == pytest.approx((0.2, 0.5, 0.3))


@pytest.mark.parametrize("search", [Riesz(points=7), Sobol(count=7)], ids=["riesz", "sobol"])
def test_what_has_ended_in_any_way_is_left_out_and_ids_name_folders(search):
    space = Space(NAMES[:3])
    everything = list(search.propose(space, (), Random(0)))
    assert len({each.id for each in everything}) == 7
    assert all(re.fullmatch(r"[a-z]+-\d+", each.id) for each in everything)
    for status in ("done", "failed", "skipped"):
        ended = [Outcome(each.id, status, each.preference) for each in everything[2:5]]
        assert list(search.propose(space, ended, Random(0))) == everything[:2] + everything[5:]

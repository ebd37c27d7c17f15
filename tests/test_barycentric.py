"""Which trained candidates are mixed for a wanted preference, and in which shares."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import Delaunay

from moalign.errors import PreferenceError
from moalign.sweeps import neighbours


def test_two_objectives_take_the_two_neighbours():
    grid = [(k / 10, 1 - k / 10) for k in (7, 0, 3, 10, 4)]
    assert neighbours.barycentric((0.36, 0.64), grid) == pytest.approx([0, 0, 0.4, 0, 0.6], abs=1e-12)
    assert neighbours.barycentric((0.85, 0.15), grid) == pytest.approx([0.5, 0, 0, 0.5, 0], abs=1e-12)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_a_point_that_was_trained_is_itself(objectives):
    grid = [tuple(k / 4 for k in point) for point in np.ndindex(*[5] * objectives) if sum(point) == 4]
    for k, point in enumerate(grid):  # exactly, and of equal points the first
        assert neighbours.barycentric(point, grid + grid) == (*np.eye(len(grid))[k], *[0.0] * len(grid))


@settings(max_examples=60, deadline=None)
@given(objectives=st.integers(2, 5), extra=st.integers(0, 12), seed=st.integers(0, 10_000))
def test_the_mix_is_convex_reproduces_the_point_and_needs_few(objectives, extra, seed):
    rng = np.random.default_rng(seed)
    points = np.vstack([np.eye(objectives), rng.dirichlet(np.ones(objectives), extra)])
    wanted = rng.dirichlet(np.ones(objectives))
    c = np.array(neighbours.barycentric(wanted.tolist(), points.tolist()))
    assert c.min() >= 0 and c.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(c @ points, wanted, atol=1e-12)
    order = rng.permutation(len(points))
    np.testing.assert_allclose(neighbours.barycentric(wanted.tolist(), points[order].tolist()), c[order], atol=1e-12)
    used = points[c > 0]
    assert len(used) <= objectives
    assert np.linalg.matrix_rank(np.column_stack([used, np.ones(len(used))])) == len(used)  # none can be left out


@pytest.mark.parametrize("seed", range(5))
def test_three_objectives_take_the_delaunay_triangle(seed):
    rng = np.random.default_rng(seed)
    points = np.vstack([np.eye(3), rng.dirichlet(np.ones(3), 8)])
    # the plane of the simplex in coordinates that keep distances
    plane = np.linalg.svd(np.eye(3) - 1 / 3)[0][:, :2]
    triangles = Delaunay(points @ plane)
    for wanted in rng.dirichlet(np.ones(3), 10):
        used = np.flatnonzero(neighbours.barycentric(wanted.tolist(), points.tolist()))
        assert set(used) == set(triangles.simplices[triangles.find_simplex(wanted @ plane)])


def test_rounded_weights_are_taken_as_they_are_written():
    thirds = [(1 / 3, 2 / 3), (2 / 3, 1 / 3)]
    for wanted in ((0.333333, 0.666667), (0.333333, 0.6666665)):  # beyond the hull by 3e-7, and short of 1 by 5e-7
        assert neighbours.barycentric(wanted, thirds) == pytest.approx([1, 0], abs=2e-6)


def test_what_lies_outside_of_the_hull_is_refused():
    with pytest.raises(PreferenceError, match=r"outside .*\(weight 0: 0\.2 to 0\.8\)"):
        neighbours.barycentric((0.1, 0.9), [(0.2, 0.8), (0.8, 0.2)])
    inner = [(0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8)]
    with pytest.raises(PreferenceError, match="outside"):
        neighbours.barycentric((0.46, 0.46, 0.08), inner)
    assert neighbours.barycentric((0.45, 0.45, 0.1), inner) == pytest.approx([0.5, 0.5, 0], abs=1e-12)


def test_vectors_that_are_no_weights_are_refused():
    for wanted, points, message in (
        ((0.5, 0.5), [], "no trained candidate"),
        ((0.5, 0.6), [(1.0, 0.0)], "add up to 1.1"),
        ((-0.5, 1.5), [(1.0, 0.0)], "the wanted weights"),
        ((0.5, 0.5), [(1.0, 0.0), (1.0, 0.0, 0.0)], "point 1"),
        ((0.5, 0.5), [(math.nan, 1.0)], "point 0"),
        ((), [()], "the wanted weights"),
    ):
        with pytest.raises(PreferenceError, match=message):
            neighbours.barycentric(wanted, points)

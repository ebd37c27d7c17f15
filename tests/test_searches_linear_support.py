"""Optimistic linear support: finds every vertex of a convex coverage set, bounds the rest, and stops."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
from scipy.optimize import linprog

from moalign.api import Outcome, Preference, Space
from moalign.testing import check_search
from moalign_plugins.searches._corner_weights import corner_weights, upper_bounds
from moalign_plugins.searches.optimistic_linear_support import OptimisticLinearSupport

NAMES = ("concise", "harmless", "helpful", "polite", "truthful")


def solve(search, points, space=None, price=0.0, limit=200):
    """Drive the search with a solver that finds the best of a finite set of points; the history."""
    points = np.asarray(points, dtype=float)
    space = space or Space(NAMES[: points.shape[1]])
    history = []
    while proposed := search.propose(space, tuple(history), Random(0)):
        for candidate in proposed:
            weights = np.array(candidate.preference.vector(space.objectives))
            best = points[int((points @ weights).argmax())]
            scores = dict(zip(space.objectives, best.tolist(), strict=True))
            done = Outcome(candidate.id, "done", candidate.preference, scores, kl=0.0, kind=candidate.kind)
            history.append(done)
        assert len(history) < limit
    return history


def found(history):
    return {tuple(outcome.scores.values()) for outcome in history}


def even(objectives, divisions):
    rows = itertools.product(range(divisions + 1), repeat=objectives)
    return np.array([row for row in rows if sum(row) == divisions]) / divisions


def test_every_vertex_that_some_weights_prefer_is_found_and_then_it_stops():
    points = [(0, 10), (2, 9.5), (5, 8), (8, 4.5), (9, 2.5), (10, 0), (4, 4), (5, 7.9)]  # the last two are no vertices
    history = solve(OptimisticLinearSupport(points=50, tolerance=0.0), points)
    assert found(history) == {tuple(map(float, point)) for point in points[:6]}
    # each call finds a vertex or shows that a corner is one: vertices + corners between them (Roijers et al., 2015)
    assert len(history) <= 6 + 5


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_for_all_weights_it_reaches_what_the_whole_set_reaches(objectives):
    rng = np.random.default_rng(objectives)
    points = np.abs(rng.normal(size=(9 - objectives, objectives)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)  # on a sphere: each is a vertex
    history = solve(OptimisticLinearSupport(points=150, tolerance=0.0), points)
    reached = np.array([list(outcome.scores.values()) for outcome in history])
    weights = even(objectives, 10)
    short = (weights @ points.T).max(1) - (weights @ reached.T).max(1)
    assert short.max() <= 2e-3  # corners are rounded to thousandths, and the points are within 1 of each other


def test_the_bound_lies_above_what_can_be_reached_and_touches_it_at_what_was_trained():
    angles = np.linspace(0, np.pi / 2, 400)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    history = solve(OptimisticLinearSupport(points=6), circle)
    weights = np.array([outcome.preference.vector(NAMES[:2]) for outcome in history])
    reached = np.array([list(outcome.scores.values()) for outcome in history])
    best = (weights @ reached.T).max(1)
    wanted = even(2, 50)
    assert (upper_bounds(wanted, weights, best) >= (circle @ wanted.T).max(0) - 1e-9).all()
    assert upper_bounds(weights, weights, best) == pytest.approx(best, abs=1e-9)
    far = upper_bounds(even(2, 2), np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([1.0, 0.5]))
    assert far[0] > 100 and far[1:] == pytest.approx([0.5, 1.0])  # nothing bounds the second objective


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_the_hull_bounds_what_the_linear_programmes_bound(objectives):
    rng = np.random.default_rng(3)
    weights = np.vstack([np.eye(objectives), rng.dirichlet(np.ones(objectives), 12)])
    best = (weights @ rng.normal(size=(20, objectives)).T).max(1)
    wanted = np.vstack([rng.dirichlet(np.ones(objectives), 40), weights])
    programmes = [linprog(best, A_eq=weights.T, b_eq=each, method="highs-ds").fun for each in wanted]
    assert np.abs(upper_bounds(wanted, weights, best) - programmes).max() < 1e-9
    flat = weights @ np.arange(objectives)
    assert np.abs(upper_bounds(wanted, weights, flat) - wanted @ np.arange(objectives)).max() < 1e-9


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
def test_corners_are_where_the_surface_bends(objectives):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, objectives))
    corners = corner_weights(values)
    assert np.allclose(corners.sum(1), 1) and corners.min() >= 0
    for alone in np.eye(objectives):
        assert np.abs(corners - alone).max(1).min() < 1e-8
    for corner in corners:  # as many surfaces and edges of the simplex meet as there are free weights
        heights = values @ corner
        meeting = int((heights > heights.max() - 1e-6).sum()) + int((corner < 1e-7).sum())
        assert meeting >= objectives


def test_two_surfaces_meet_where_they_are_equal():
    corners = corner_weights(np.array([(1.0, 0.0), (0.0, 3.0)]))
    assert np.allclose(corners, [(0, 1), (0.75, 0.25), (1, 0)])
    assert np.allclose(corner_weights(np.array([(1.0, 2.0), (1.0, 2.0)])), [(0, 1), (1, 0)])  # one point, twice


def test_it_stops_below_the_tolerance_and_a_smaller_one_costs_more():
    angles = np.linspace(0, np.pi / 2, 2000)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    counts = [
        len(solve(OptimisticLinearSupport(points=500, tolerance=tolerance), circle)) for tolerance in (0.1, 0.01, 0.001)
    ]
    assert counts[0] < counts[1] < counts[2] < 60
    weights = even(2, 200)
    reached = np.array(
        [list(o.scores.values()) for o in solve(OptimisticLinearSupport(points=500, tolerance=0.01), circle)]
    )
    assert ((circle @ weights.T).max(0) - (reached @ weights.T).max(0)).max() <= 0.01 * 1.0  # gains are at most 1


def test_more_are_proposed_at_once_where_a_pass_holds_more():
    angles = np.linspace(0, np.pi / 2, 300)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    space = Space(NAMES[:2], together=4)
    history = solve(OptimisticLinearSupport(points=9), circle, space)
    assert len(history) == 9
    proposed = OptimisticLinearSupport(points=9).propose(space, tuple(history[:5]), Random(0))
    assert len(proposed) == 4 and len({candidate.id for candidate in proposed}) == 4


def test_the_price_of_kl_decides_among_points():
    """The candidate for helpful alone scores most and is so far from the base that it serves nobody."""
    space = Space(NAMES[1:3], kl_price=0.1)
    weights = [(1.0, 0.0), (0.0, 1.0)]
    scores, kl = [(0.6, 0.1), (0.1, 0.9)], [0.0, 20.0]
    history = [
        Outcome(f"o{i}", "done", _weights(space, w), dict(zip(space.objectives, s, strict=True)), kl=k)
        for i, (w, s, k) in enumerate(zip(weights, scores, kl, strict=True))
    ]
    assert OptimisticLinearSupport().propose(space, history, Random(0)) == []  # (0.6, 0.1) dominates (-1.9, -1.1)
    free = Space(NAMES[1:3])
    (candidate,) = OptimisticLinearSupport().propose(free, history, Random(0))
    assert candidate.preference.values == {"harmless": 0.615, "helpful": 0.385}  # 0.5 w = 0.8 (1 - w)
    assert candidate.shares == {"o0": 0.615, "o1": 0.385} and candidate.changes == {"train.steps": 1}
    (near,) = OptimisticLinearSupport(warm_start="neighbour").propose(free, history, Random(0))
    assert near.parents == ("o0",) and not near.shares


def test_when_the_budget_is_spent_the_gaps_that_remain_are_mixed():
    space = Space(NAMES[:2])
    done = [
        Outcome("a", "done", _weights(space, (1.0, 0.0)), {"concise": 1.0, "harmless": 0.0}),
        Outcome("b", "done", _weights(space, (0.0, 1.0)), {"concise": 0.0, "harmless": 1.0}),
    ]
    search = OptimisticLinearSupport(mixes=2)
    (trained,) = search.propose(space, done, Random(0))
    assert trained.kind == "trained" and trained.preference.values["concise"] == 0.5
    skipped = Outcome(trained.id, "skipped", trained.preference)
    (mixed,) = search.propose(space, [*done, skipped], Random(0))
    assert mixed.kind == "mixed" and mixed.preference == trained.preference and mixed.id != trained.id
    assert OptimisticLinearSupport().propose(space, [*done, skipped], Random(0)) == []


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_an_objective_whose_own_training_failed_is_tried_between_it_and_the_middle(objectives):
    space, search = Space(NAMES[:objectives], steps=100), OptimisticLinearSupport(points=6)
    history = [
        Outcome(f"p{place}", "done", _weights(space, row), dict(zip(space.objectives, row, strict=True)))
        for place, row in enumerate(np.eye(objectives).tolist())
    ]
    history[0] = Outcome("p0", "failed", history[0].preference)
    proposed = search.propose(space, history, Random(0))
    if objectives == 1:
        assert proposed == []
        return
    (instead,) = proposed
    own, *_ = instead.preference.vector(space.objectives)
    assert own == pytest.approx((1 + 1 / objectives) / 2, abs=1e-3) and not instead.changes and not instead.parents
    reached = dict(zip(space.objectives, (0.8, *[0.3] * (objectives - 1)), strict=True))
    done = [*history, Outcome(instead.id, "done", instead.preference, reached)]
    (following, *_) = search.propose(space, done, Random(0))
    assert following.changes, "and then it goes on where most can be gained"
    failed = [*history, Outcome(instead.id, "failed", instead.preference)]
    assert instead.id not in [each.id for each in search.propose(space, failed, Random(0))]
    assert OptimisticLinearSupport(points=objectives).propose(space, history, Random(0)) == []


def test_what_trained_candidates_do_not_enclose_is_not_mixed():
    space = Space(NAMES[:2])
    done = [
        Outcome("a", "done", _weights(space, (1.0, 0.0)), {"concise": 1.0, "harmless": 0.0}),
        Outcome("b", "done", _weights(space, (0.5, 0.5)), {"concise": 0.8, "harmless": 0.8}),
    ]
    alone = Outcome("c", "skipped", _weights(space, (0.0, 1.0)))
    (cheaper,) = OptimisticLinearSupport(mixes=4).propose(space, [*done, alone], Random(0))
    assert cheaper.kind == "trained" and cheaper.changes, "the budget may pay one of fewer steps"
    unpaid = [alone, Outcome(cheaper.id, "skipped", cheaper.preference)]
    mixed = OptimisticLinearSupport(mixes=4).propose(space, [*done, *unpaid], Random(0))
    assert mixed and all(candidate.mixed and candidate.preference.values["concise"] >= 0.5 for candidate in mixed)
    assert OptimisticLinearSupport(mixes=4).propose(space, [done[0], *unpaid], Random(0)) == []


def test_it_keeps_the_contract_of_searches():
    check_search(OptimisticLinearSupport(points=6), objectives=4)
    check_search(OptimisticLinearSupport(points=4, mixes=3, warm_start=None), objectives=3)


def _weights(space, numbers):
    return Preference("weights", dict(zip(space.objectives, numbers, strict=True)))

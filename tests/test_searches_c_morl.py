"""C-MORL: which policies are extended, from where, and how far the other objectives may fall."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from made_up_fronts import caved, done, driven, solver, space, sphere

from moalign.api import Outcome, Preference, non_dominated, values
from moalign_plugins.searches._crowding import crowding_distance, loneliest
from moalign_plugins.searches.c_morl import CMORL

# --- crowding distance ------------------------------------------------------------------------------------------------


def test_crowding_distance_of_four_points_by_hand():
    """Ranges 10 and 8: the second has neighbours 3 and 5 apart, the third 9 and 6."""
    points = [(0.0, 8.0), (1.0, 6.0), (3.0, 3.0), (10.0, 0.0)]
    expected = [math.inf, 3 / 10 + 5 / 8, 9 / 10 + 6 / 8, math.inf]
    assert crowding_distance(points) == pytest.approx(expected, rel=1e-9)
    order = [2, 0, 3, 1]
    assert crowding_distance([points[at] for at in order]) == pytest.approx([expected[at] for at in order], rel=1e-9)
    assert loneliest(points, 4) == [0, 3, 2, 1] and loneliest(points, 2) == [0, 3]


def test_the_loneliest_are_not_dominated_and_differ_from_each_other_and_from_the_used():
    points = [(1.0, 6.0), (0.0, 8.0), (0.5, 5.0), (3.0, 3.0), (10.0, 0.0), (0.0, 8.0), (3.0, 3.0)]
    assert loneliest(points, 9) == [1, 4, 3, 0]
    assert loneliest(points, 9, used=[(10.0, 0.0), (3.0, 3.0)]) == [1, 0]
    assert loneliest([], 3) == crowding_distance([]) == []
    assert loneliest([(1.0, 1.0)] * 3, 3) == [0]
    assert loneliest([(1.0, 1.0), (1.0, 2.0), (0.0, 3.0)], 3) == [1, 2]


def test_crowding_distance_sums_over_objectives_and_leaves_out_what_is_constant():
    generator = np.random.default_rng(1)
    points = np.c_[generator.normal(size=(30, 3)), np.full(30, 7.0)]
    expected = np.zeros(30)
    for column in points.T[:3]:
        order = np.argsort(column)
        gaps = (column[order][2:] - column[order][:-2]) / np.ptp(column)
        expected[order] += [np.inf, *gaps, np.inf]
    assert crowding_distance(points.tolist()) == pytest.approx(expected.tolist(), rel=1e-7)


# --- C-MORL -----------------------------------------------------------------------------------------------------------


def test_the_grid_takes_its_share_of_the_steps_and_the_extensions_the_rest():
    for rounds, rest in ((1, 40), (2, 20), (3, 13)):
        search = CMORL(points=4, extended=2, rounds=rounds)
        _, (first, *others) = driven(search, space(2), solver(sphere(2)))
        assert [each.changes for each in first] == [{"train.steps": 60}] * 4 and not any(each.parents for each in first)
        assert len(others) <= rounds
        assert all(each.changes == {"train.steps": rest} for batch in others for each in batch)
    alone = driven(CMORL(), space(1), solver(sphere(1)))[1]
    assert len(alone) == 1 and [each.changes for each in alone[0]] == [{}]


@pytest.mark.parametrize("shift", [0.0, 5.0], ids=["positive returns", "negative returns"])
@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_every_start_keeps_to_its_own_levels_and_every_objective_is_extended_once(objectives, shift):
    where, search = space(objectives), CMORL(points=20, extended=3, slack=0.2)
    history, (first, second) = driven(search, where, solver(sphere(objectives, shift)))
    known = {outcome.id: outcome for outcome in history[: len(first)]}
    front = np.array([list(outcome.scores.values()) for outcome in known.values()])
    ranges = np.ptp(front[non_dominated(front)], axis=0)
    starts = list(dict.fromkeys(candidate.parents for candidate in second))
    assert len(second) == len(starts) * objectives == 3 * objectives
    pairs = []
    for candidate in second:
        levels, start = candidate.preference.values, known[candidate.parents[0]].scores
        (extended,) = set(where.objectives) - set(levels)
        pairs.append((candidate.parents, extended))
        assert candidate.preference.kind == "thresholds" and list(levels) == sorted(levels)
        for name, width in zip(where.objectives, ranges, strict=True):
            if name != extended:
                assert levels[name] < start[name]  # feasible from the start, whatever the sign
                assert levels[name] == pytest.approx(start[name] - 0.2 * width, abs=1e-12)
    assert len(set(pairs)) == len(pairs)


def ended(points=6, **more):
    """A history of the grid's candidates with these scores."""
    candidates = CMORL(points=points, **more).propose(space(2), (), Random(0))
    return [candidate.id for candidate in candidates]


def test_the_starts_are_the_most_crowded_out_and_dominated_ones_are_none():
    scores = [(0.0, 8.0), (10.0, 0.0), (1.0, 6.0), (3.0, 3.0), (2.0, 2.0), (1.0, 5.9)]
    history = [done(id, each) for id, each in zip(ended(), scores, strict=True)]
    proposed = CMORL(extended=3).propose(space(2), history, Random(0))
    ids = [outcome.id for outcome in history]
    assert [each.parents[0] for each in proposed] == [ids[at] for at in (0, 0, 1, 1, 3, 3)]
    assert [each.id for each in proposed[:2]] == ["extended-1-0-a", "extended-1-0-b"]
    assert proposed[0].preference.values == pytest.approx({"b": 8 - 0.1 * 8})
    assert proposed[-1].preference.values == pytest.approx({"a": 3 - 0.1 * 10})


def test_what_only_pays_more_kl_is_no_start_and_levels_are_scores_as_they_are():
    ids = ended(points=3)
    history = [done(ids[0], (1.0, 0.0), kl=0.0), done(ids[1], (0.0, 1.0), kl=0.0), done(ids[2], (1.2, 1.2), kl=10.0)]
    free = CMORL(points=3).propose(space(2), history, Random(0))
    assert {each.parents[0] for each in free} == {ids[2]}
    priced = CMORL(points=3).propose(space(2, kl_price=0.2), history, Random(0))
    assert {each.parents[0] for each in priced} == {ids[0], ids[1]}
    cheap = CMORL(points=3).propose(space(2, kl_price=0.01), history, Random(0))
    assert values(history[2], space(2, kl_price=0.01)) == pytest.approx((1.1, 1.1))
    # a single point has no range: what there is beside it has one
    assert cheap[0].preference.values == pytest.approx({"b": 1.2 - 0.1 * 1.2})


def test_one_policy_alone_has_its_range_from_the_base():
    ids = ended(points=2)
    history = [done(ids[0], (-1.0, -2.0)), Outcome(ids[1], "failed", Preference("weights", {"a": 0.0, "b": 1.0}))]
    first, second = CMORL(points=2).propose(space(2, base={"a": -3.0, "b": -2.5}), history, Random(0))
    assert first.preference.values == pytest.approx({"b": -2.05}) and second.preference.values == {"a": -1.2}
    assert first.parents == second.parents == (ids[0],)
    unknown = CMORL(points=2).propose(space(2), history, Random(0))
    assert [each.preference.values for each in unknown] == [{"b": -2.0}, {"a": -1.0}]


def test_a_later_round_starts_from_the_new_front_and_nowhere_twice():
    search, where = CMORL(points=4, extended=2, rounds=4), space(2)
    front = sphere(2)
    history, (_, *rounds) = driven(search, where, solver(front))
    scores = {outcome.id: tuple(outcome.scores.values()) for outcome in history}
    starts = [list(dict.fromkeys(scores[each.parents[0]] for each in batch)) for batch in rounds]
    assert len(rounds) > 1 and sum(map(len, starts)) == len({each for batch in starts for each in batch})
    later = {each.parents[0] for batch in rounds[1:] for each in batch}
    assert any(id.startswith("extended-") for id in later)


def test_what_nobody_proposed_is_a_start_like_others_and_changes_no_round_that_has_begun():
    ids = ended(points=2)
    history = [done(ids[0], (1.0, 0.0)), done("stranger", (0.7, 0.7)), done(ids[1], (0.0, 1.0))]
    history += [done("asked", (0.9, 0.9), kind="conditioned")]  # it has no adapter of its own
    proposed = CMORL(points=2).propose(space(2), history, Random(0))
    assert [each.parents[0] for each in proposed[::2]] == [ids[0], ids[1], "stranger"]
    begun = [*history, done(proposed[0].id, (1.1, 0.1)), done("late", (5.0, 5.0))]
    assert CMORL(points=2).propose(space(2), begun, Random(0)) == proposed[1:]


def test_extensions_find_what_weights_do_not():
    front = caved()
    history, (first, _) = driven(CMORL(points=6, extended=5, slack=0.5), space(2), solver(front))
    by_weights = {tuple(outcome.scores.values()) for outcome in history[: len(first)]}
    assert by_weights == {(0.0, 1.0), (1.0, 0.0)}
    inner = [outcome.scores["a"] for outcome in history[len(first) :] if 0 < outcome.scores["a"] < 1]
    assert inner and all(outcome.preference.kind == "thresholds" for outcome in history[len(first) :])

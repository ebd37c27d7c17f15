"""Successive halving: what goes on, how many steps it gets, and that it ends whatever becomes of the candidates."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import sqrt
from random import Random

import pytest

from moalign.api import ConfigError, Outcome, Space, hypervolume
from moalign.testing import check_search
from moalign_plugins.searches.successive_halving import SuccessiveHalving, best

NAMES = ("concise", "fluent", "harmless", "helpful", "polite")


def scores(candidate, space):
    """A concave front; more steps come nearer to it."""
    return {name: sqrt(value) for name, value in candidate.preference.values.items()}


def drive(search, space, world=scores, fate=lambda candidate: "done"):
    """All rounds of proposals, and the history."""
    history: list[Outcome] = []
    rounds = []
    while proposed := list(search.propose(space, tuple(history), Random(0))):
        rounds.append(proposed)
        for each in proposed:
            status = fate(each)
            found = world(each, space) if status == "done" else {}
            history.append(
                Outcome(each.id, status, each.preference, scores=found, changes=each.changes, tokens=1, kl=0.0)
            )
        assert len(rounds) < 20
    return rounds, history


@pytest.mark.parametrize(
    "search",
    [SuccessiveHalving(points=6, eta=1.5, rungs=4), SuccessiveHalving(points=4, rungs=1)],
    ids=["four rungs", "one rung"],
)
def test_it_keeps_to_the_contract(search):
    check_search(search, objectives=3)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("eta", "rungs", "steps"), [(3.0, 3, 100), (2.0, 4, 60), (1.5, 5, 33), (3.0, 1, 7)])
def test_steps_add_up_exactly_along_every_line_of_parents(objectives, eta, rungs, steps):
    space = Space(NAMES[:objectives], steps=steps, seed=11)
    rounds, _ = drive(SuccessiveHalving(points=16, eta=eta, rungs=rungs), space)
    assert len(rounds) == rungs
    by_id = {each.id: each for proposed in rounds for each in proposed}
    for last in rounds[-1]:
        total, each = last.changes["train.steps"], last
        while each.parents:
            assert by_id[each.parents[0]].preference == each.preference
            each = by_id[each.parents[0]]
            total += each.changes["train.steps"]
        assert total == steps
    assert all(len(after) <= len(before) for before, after in pairwise(rounds))
    for number, proposed in enumerate(rounds):  # a rung sees data of its own
        assert {each.changes.get("seed", space.seed) for each in proposed} == {space.seed + number}
    extremes = {tuple(float(one == other) for other in range(objectives)) for one in range(objectives)}
    assert extremes <= {each.preference.vector(space.objectives) for each in rounds[-1]}


def test_as_many_go_on_as_the_share_says():
    rounds, _ = drive(SuccessiveHalving(points=27, eta=3.0, rungs=4), Space(NAMES[:2], steps=270))
    assert [len(proposed) for proposed in rounds] == [27, 9, 3, 2]  # 1, but both extremes stay


def test_with_one_objective_the_best_go_on():
    points = [(3.0,), (5.0,), (1.0,), (4.0,), (5.0,)]
    assert best(points, 4, None) == [1, 4, 3, 0]
    assert best(points, 4, (100.0,)) == [1, 4, 3, 0]


def test_what_goes_on_has_the_hypervolume_of_the_greedy_choice():
    """Against an independent one, on points of which none is dominated; and never below what theory promises of it."""
    rng = Random(3)
    for objectives in (2, 3):
        for _ in range(5):
            raw = [[rng.random() + 0.05 for _ in range(objectives)] for _ in range(8)]
            points = [tuple(v / sqrt(sum(x * x for x in row)) for v in row) for row in raw]
            origin = tuple(0.0 for _ in range(objectives))
            chosen = best(points, 5, origin)
            assert len(chosen) == 5
            fixed = chosen[: len({max(range(8), key=lambda one: points[one][k]) for k in range(objectives)})]
            expected = list(fixed)
            while len(expected) < 5:
                rest = [place for place in range(8) if place not in expected]
                expected.append(max(rest, key=lambda one: hypervolume([points[p] for p in [*expected, one]], origin)))
            assert chosen == expected
            top = max(hypervolume([points[p] for p in some], origin) for some in combinations(range(8), 5))
            assert hypervolume([points[p] for p in chosen], origin) >= (1 - 1 / 2.718) * top


def test_dominated_points_go_on_only_after_all_others_and_equals_in_their_order():
    points = [(1.0, 0.0), (0.2, 0.2), (0.5, 0.5), (0.5, 0.5), (0.0, 1.0)]
    assert best(points, 3, None) == [0, 4, 2]
    assert best(points, 5, None) == [0, 4, 2, 3, 1]
    assert best(points, 3, (2.0, 2.0)) == [0, 4, 2]  # where nothing reaches the reference, the rung's own


def test_units_of_an_objective_change_nothing():
    rng = Random(1)
    points = [(rng.random(), rng.random(), rng.random()) for _ in range(12)]
    reference = (-0.1, 0.05, 0.1)
    scaled = [(1000 * a - 7, b / 500, c) for a, b, c in points]
    assert best(points, 7, reference) == best(scaled, 7, (1000 * -0.1 - 7, 0.05 / 500, 0.1))


def test_the_reference_is_that_of_the_run_then_the_base():
    known = SuccessiveHalving(points=11, rungs=2, eta=3.0)

    def world(candidate, space):  # two bulges: one where both are above 0.45, one beyond it
        first = candidate.preference.vector(space.objectives)[0]
        return dict(zip(space.objectives, (first, 1 - first), strict=True))

    free = Space(NAMES[:2], steps=30)
    high = Space(NAMES[:2], steps=30, reference_point={NAMES[0]: 0.45, NAMES[1]: 0.25}, base={NAMES[0]: 0, NAMES[1]: 0})
    for space in (free, high):
        rounds, _ = drive(known, space, world)
        kept = {each.preference.vector(space.objectives)[0] for each in rounds[1]}
        assert {0.0, 1.0} <= kept and len(kept) == 4
        if space is high:
            assert all(0.45 < value < 0.75 for value in kept - {0.0, 1.0})


def test_what_failed_or_was_skipped_drops_out_and_nothing_waits_for_it():
    space = Space(NAMES[:2], steps=90)
    for status in ("failed", "skipped"):
        rounds, history = drive(
            SuccessiveHalving(), space, fate=lambda each, s=status: s if "0.50" in each.id else "done"
        )
        gone = {each.id for each in history if each.status == status}
        assert gone and not any(gone.intersection(each.parents) for proposed in rounds for each in proposed)
        rounds, _ = drive(SuccessiveHalving(), space, fate=lambda each, s=status: s)
        assert len(rounds) == 1
        rounds, _ = drive(SuccessiveHalving(), space, fate=lambda each, s=status: s if each.parents else "done")
        assert len(rounds) == 2


def test_too_few_steps_for_the_rungs_are_refused():
    with pytest.raises(
        ConfigError, match=r"search\.rungs: 4 rungs with eta 3 leave one of them no step of train.steps 10"
    ):
        SuccessiveHalving(rungs=4).propose(Space(NAMES[:2], steps=10), (), Random(0))


def test_it_costs_less_than_training_all():
    rounds, _ = drive(SuccessiveHalving(points=27, rungs=3), Space(NAMES[:2], steps=90))
    spent = sum(each.changes["train.steps"] for proposed in rounds for each in proposed)
    assert spent == 27 * 10 + 9 * 20 + 3 * 60 < 27 * 90 / 3

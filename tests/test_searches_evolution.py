"""Evolution over weights and over mixes: replay, bounds, and fronts in closed form for up to five objectives."""

from __future__ import annotations

import random
import warnings
from itertools import pairwise
from math import fsum
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from made_up_policies import drive, ellipsoid, on_ellipsoid, space
from pydantic import ValidationError

from moalign import preference
from moalign.api import ConfigError, Outcome, Preference, hypervolume, values
from moalign.testing import check_search
from moalign_plugins.searches.evolution import Evolution

SCALES = {1: (1.0,), 2: (1.0, 4.0), 3: (1.0, 2.0, 4.0), 5: (1.0, 1.5, 2.0, 2.5, 3.0)}
SEEDS = range(4)
MIXES: dict[str, Any] = {"vary": "mixes", "strength": True}
SMALL = [
    Evolution(population=5, generations=3),
    Evolution(population=6, generations=3, vary="mixes"),
    Evolution(population=8, generations=3, trained=6, **MIXES),
]


def genome(candidate):
    return tuple(candidate.preference.values.values()), tuple(sorted(candidate.shares.items()))


def uniform(objectives, count, generator, strongest=None):
    """Points for positions drawn evenly from the simplex, each objective alone first."""
    drawn = generator.dirichlet(np.ones(objectives), count - objectives)
    if strongest is not None:
        drawn = drawn * generator.uniform(0.01, strongest, (len(drawn), 1))
    return [on_ellipsoid(point, SCALES[objectives]) for point in [*np.eye(objectives), *drawn]]


# --- the contract -----------------------------------------------------------------------------------------------------


def test_it_keeps_to_the_contract_of_searches():
    check_search(Evolution(population=5, generations=2), objectives=5)
    check_search(Evolution(population=4, generations=2, trained=3, **MIXES), objectives=3)


@pytest.mark.parametrize("search", SMALL, ids=["preferences", "mixes", "strength"])
@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_a_history_cut_anywhere_is_gone_on_with_as_if_nothing_had_happened(search, objectives):
    """At the end of a proposal the next one follows; within one, what is missing of it, in whatever order it ended."""
    where = space(objectives)
    history, rounds = drive(search, where, ellipsoid(SCALES[objectives]), seed=3)
    assert len(rounds) >= 3
    by_id = {outcome.id: outcome for outcome in history}
    before: list[Outcome] = []
    for proposed in rounds:
        assert search.propose(where, tuple(before), Random(3)) == proposed
        ended = [by_id[candidate.id] for candidate in proposed[::2]][::-1]
        if len(proposed) > 1:
            assert search.propose(where, (*before, *ended), Random(3)) == proposed[1::2]
        before += [by_id[candidate.id] for candidate in proposed]
    assert search.propose(where, tuple(before), Random(3)) == []
    shuffled = Random(0).sample(before, len(before))
    assert search.propose(where, tuple(shuffled), Random(3)) == []


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_global_generators_and_filters_of_warnings_stay_as_they_are(objectives):
    states = random.getstate(), np.random.get_state(), list(warnings.filters)
    drive(SMALL[2], space(objectives), ellipsoid(SCALES[objectives]))
    now = np.random.get_state()
    assert random.getstate() == states[0] and warnings.filters == states[2]
    assert all(np.array_equal(a, b) for a, b in zip(now, states[1], strict=True))
    other = drive(SMALL[2], space(objectives), ellipsoid(SCALES[objectives]))
    np.random.seed(7)
    random.seed(7)
    assert drive(SMALL[2], space(objectives), ellipsoid(SCALES[objectives])) == other


def test_another_seed_breeds_others():
    first, second = (drive(SMALL[0], space(3), ellipsoid(SCALES[3]), seed)[1] for seed in (0, 1))
    assert [genome(each) for each in first[0][:4]] == [genome(each) for each in second[0][:4]]  # corners and middle
    assert [genome(each) for each in first[1]] != [genome(each) for each in second[1]]


# --- what is proposed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
@pytest.mark.parametrize("search", SMALL, ids=["preferences", "mixes", "strength"])
def test_no_genome_comes_twice_and_all_lie_on_the_simplex(search, objectives):
    _, rounds = drive(search, space(objectives), ellipsoid(SCALES[objectives]))
    everything = [candidate for proposed in rounds for candidate in proposed]
    assert len({genome(each) for each in everything}) == len({each.id for each in everything}) == len(everything)
    parents = len(rounds[0]) if search.vary == "mixes" else 0
    assert len(everything) <= search.population * search.generations
    alone = [tuple(float(i == j) for j in range(objectives)) for i in range(objectives)]
    assert [genome(each)[0] for each in rounds[0][:objectives]] == alone
    for candidate in everything:
        assert preference.parse(candidate.preference, space(objectives).objectives) == candidate.preference
    assert [each.mixed for each in everything] == [False] * (parents or len(everything)) + [True] * (
        len(everything) - parents if parents else 0
    )


def test_the_first_generation_has_the_objectives_alone_and_an_even_grid_inside():
    first = Evolution(population=12).propose(space(3), (), Random(0))
    points = [genome(candidate)[0] for candidate in first]
    assert len(points) == 12 and points[:3] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    fifths = {(a / 5, b / 5, (5 - a - b) / 5) for a in range(1, 4) for b in range(1, 5 - a)}
    assert {tuple(round(5 * w) / 5 for w in point) for point in points[3:9]} == fifths
    assert all(min(point) > 0 for point in points[3:9])


def test_weights_after_the_first_generation_start_from_the_nearest_that_is_done():
    search, where = Evolution(population=6, generations=3, warm_steps=0.2), space(2)
    history, rounds = drive(search, where, ellipsoid(SCALES[2]))
    assert all(not each.parents and not each.changes for each in rounds[0])
    known = {outcome.id: outcome.preference for outcome in history}
    before: list[str] = [each.id for each in rounds[0]]
    for proposed in rounds[1:]:
        for each in proposed:
            weight = each.preference.values["concise"]
            distances = {name: abs(known[name].values["concise"] - weight) for name in before}
            assert distances[each.parents[0]] == pytest.approx(min(distances.values()), abs=1e-9)
            assert dict(each.changes) == {"train.steps": 20}
        before += [each.id for each in proposed]
    fresh = drive(Evolution(population=6, generations=3, warm_steps=None), where, ellipsoid(SCALES[2]))[1]
    assert all(not each.parents and not each.changes for proposed in fresh for each in proposed)


@pytest.mark.parametrize("strength", [False, True])
def test_a_mix_stands_at_the_mean_of_its_parents_weights_by_its_shares(strength):
    search = Evolution(vary="mixes", population=16, generations=3, trained=6, strength=strength)
    _, rounds = drive(search, space(3), ellipsoid(SCALES[3]))
    parents = {candidate.id: candidate.preference for candidate in rounds[0]}
    assert len(parents) == 6
    sums = []
    for candidate in (each for proposed in rounds[1:] for each in proposed):
        sums.append(fsum(candidate.shares.values()))
        assert all(share > 0 for share in candidate.shares.values())
        for name, weight in candidate.preference.values.items():
            mean = fsum(s * parents[parent].values[name] for parent, s in candidate.shares.items()) / sums[-1]
            assert weight == pytest.approx(mean, abs=1e-12)
    if strength:
        assert 0.009 < min(sums) < 0.5 and 1.05 < max(sums) <= 1.2 + 1e-12
    else:
        assert sums == pytest.approx([1.0] * len(sums), abs=1e-12)


# --- what becomes of candidates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SMALL, ids=["preferences", "mixes", "strength"])
@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_candidates_that_come_to_nothing_are_neither_waited_for_nor_bred_from(search, status):
    seen = []

    def every_third(candidate):
        seen.append(candidate.id)
        return status if len(seen) % 3 == 2 else "done"

    history, rounds = drive(search, space(3), ellipsoid(SCALES[3]), fails=every_third)
    assert len(rounds) >= 3
    lost = {outcome.id for outcome in history if outcome.status == status}
    for candidate in (each for proposed in rounds for each in proposed):
        assert lost.isdisjoint(candidate.parents) and lost.isdisjoint(candidate.shares)


@pytest.mark.parametrize("search", SMALL, ids=["preferences", "mixes", "strength"])
def test_where_the_whole_first_generation_comes_to_nothing_the_search_is_over(search):
    _, rounds = drive(search, space(2), ellipsoid(SCALES[2]), fails=lambda _: "skipped")
    assert len(rounds) == 1


def test_what_nobody_proposed_and_equal_scores_do_no_harm():
    stranger = Outcome("only-helpful", "done", Preference("thresholds", {"concise": 0.1}), {"concise": 1.0})
    search, where = SMALL[0], space(3)
    history, rounds = drive(search, where, lambda candidate, weights: [0.5, 0.5, 0.5])
    assert len(rounds) == 3
    first = [outcome for outcome in history if outcome.id in {each.id for each in rounds[0]}]
    assert search.propose(where, (stranger, *first), Random(0)) == rounds[1]


def test_the_kl_is_paid_for():
    """At a price, other candidates are the best, so that others are bred."""
    history, rounds = drive(SMALL[0], space(2), ellipsoid(SCALES[2]))
    first = [
        Outcome(each.id, "done", each.preference, each.scores, kl=3.0 * each.preference.values["concise"])
        for each in history[: len(rounds[0])]
    ]
    free = SMALL[0].propose(space(2), tuple(first), Random(0))
    priced = SMALL[0].propose(space(2, kl_price=1.0), tuple(first), Random(0))
    assert [genome(each) for each in free] == [genome(each) for each in rounds[1]]
    assert [genome(each) for each in priced] != [genome(each) for each in free]


# --- how good it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, MIXES], ids=["preferences", "mixes"])
@pytest.mark.parametrize(("objectives", "population", "generations"), [(2, 10, 4), (3, 12, 5), (5, 20, 5)])
def test_generations_gain_hypervolume_and_end_above_as_many_random_points(objectives, population, generations, options):
    """On ellipsoids with half axes that differ; in the mean over seeds."""
    search = Evolution(population=population, generations=generations, **options)
    reached, by_chance = [], []
    for seed in SEEDS:
        history, rounds = drive(search, space(objectives), ellipsoid(SCALES[objectives]), seed)
        points = [values(outcome, space(objectives)) for outcome in history]
        ends = np.cumsum([len(proposed) for proposed in rounds])
        reached.append([hypervolume(points[:end], [0.0] * objectives) for end in ends])
        chance = uniform(objectives, len(points), np.random.default_rng(seed), 1.2 if options else None)
        by_chance.append(hypervolume(chance, [0.0] * objectives))
    means = [fmean(column) for column in zip(*reached, strict=True)]
    assert all(later > earlier for earlier, later in pairwise(means))
    assert means[-1] > fmean(by_chance)


def test_strengths_are_bred_towards_the_best_one():
    """Mixes are best at strength 0.9: the last generation is nearer to it than the first."""
    search = Evolution(vary="mixes", population=14, generations=7, strength=True)
    first, last = [], []
    for seed in SEEDS:
        _, rounds = drive(search, space(2), ellipsoid(SCALES[2]), seed)
        for proposed, into in ((rounds[1], first), (rounds[-1], last)):
            into += [abs(fsum(candidate.shares.values()) - 0.9) for candidate in proposed]
    assert fmean(last) < 0.6 * fmean(first)


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_that_contradict_each_other_are_refused():
    for options, message in (
        ({"strength": True}, "vary: mixes"),
        ({"trained": 3}, "vary: mixes"),
        ({"vary": "mixes", "trained": 9, "population": 8}, r"population \(8\) must be at least trained \(9\)"),
        ({"population": 1}, "greater than or equal to 2"),
        ({"generations": 0}, "greater than or equal to 1"),
        ({"warm_steps": 0}, "greater than 0"),
        ({"vary": "both"}, "preferences"),
    ):
        with pytest.raises(ValidationError, match=message):
            Evolution(**options)
    with pytest.raises(ConfigError, match=r"search.population: 4 cannot hold one for each of 5 objectives"):
        Evolution(population=4).propose(space(5), (), Random(0))

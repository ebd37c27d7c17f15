"""Searches: pure functions of the history that cover what they promise, exactly and once."""

from __future__ import annotations

import re
from fractions import Fraction
from math import comb
from random import Random as Generator
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moalign.api import ConfigError, Outcome, Preference, PreferenceError, Space
from moalign_plugins.searches.grid import Grid
from moalign_plugins.searches.listed import Listed
from moalign_plugins.searches.random import Random
from moalign_plugins.searches.soup import Soup

FOLDER = re.compile(r"\w[\w.+=-]*")


def space(objectives, **preferences):
    names = ("harmless", "helpful", "concise", "truthful", "fluent", "polite")
    return Space(names[:objectives], preferences)


def propose(search, space, done=(), seed=0):
    history = [Outcome(candidate.id, "done", candidate.preference) for candidate in done]
    return list(search.propose(space, history, Generator(seed)))


SEARCHES = [
    (Grid(), space(2)),
    (Grid(partitions=4), space(3)),
    (Random(count=7), space(3)),
    (Listed(), space(2, safe=Preference("weights", {"harmless": 1.0, "helpful": 0.0}), kind=Preference("weights", {}))),
]


@pytest.mark.parametrize(("search", "where"), SEARCHES, ids=repr)
def test_what_is_in_the_history_is_not_proposed_again(search, where):
    everything = propose(search, where)
    assert len(everything) > 1
    assert propose(search, where) == everything
    for cut in range(len(everything) + 1):
        assert propose(search, where, done=everything[:cut]) == everything[cut:]
    assert propose(search, where, done=everything[1:]) == everything[:1]  # finished in another order
    failed = [Outcome(everything[0].id, "failed", everything[0].preference, error="boom")]
    assert list(search.propose(where, failed, Generator(0))) == everything[1:]


@settings(max_examples=80, deadline=None)
@given(objectives=st.integers(1, 5), partitions=st.integers(1, 12))
def test_the_grid_is_exact(objectives, partitions):
    candidates = propose(Grid(partitions=partitions), space(objectives))
    names = space(objectives).objectives
    points = [candidate.preference.vector(names) for candidate in candidates]
    steps = [tuple(Fraction(value).limit_denominator(partitions) for value in point) for point in points]
    assert len(points) == (comb(partitions + objectives - 1, objectives - 1) if objectives > 1 else 1)
    assert len(set(steps)) == len(points)
    for point, fractions in zip(points, steps, strict=True):
        assert sum(fractions) == 1 and abs(sum(point) - 1) <= 1e-12
        assert all(step.numerator * partitions % step.denominator == 0 for step in fractions)
        assert list(point) == [float(step) for step in fractions]  # the nearest float, no dust of a subtraction
    identity = [tuple(float(i == j) for j in range(objectives)) for i in range(objectives)]
    assert points[:objectives] == identity  # single objectives first, in order
    assert all(candidate.preference.kind == "weights" for candidate in candidates)


@settings(max_examples=60, deadline=None)
@given(objectives=st.integers(1, 5), points=st.integers(1, 200))
def test_points_are_an_upper_bound_that_is_used_as_far_as_possible(objectives, points):
    if points < objectives:
        with pytest.raises(ConfigError, match=f"search.points: {points} cannot hold"):
            propose(Grid(points=points), space(objectives))
        return
    proposed = len(propose(Grid(points=points), space(objectives)))
    assert proposed <= points
    if objectives > 1:
        fits = [comb(n + objectives - 1, objectives - 1) for n in range(1, points + 1)]
        assert proposed == max(size for size in fits if size <= points)
    else:
        assert proposed == 1


@pytest.mark.parametrize("partitions", [1, 2, 3, 7, 99, 100, 101, 150, 1000, 1024])
def test_ids_are_folders_and_stay_apart_on_fine_grids(partitions):
    candidates = propose(Grid(partitions=partitions), space(2))
    ids = [candidate.id for candidate in candidates]
    assert len(set(ids)) == partitions + 1
    assert all(FOLDER.fullmatch(id) and len(id) < 100 for id in ids)


def test_the_default_grid_reads_well():
    candidates = propose(Grid(), space(2))
    assert [candidate.id for candidate in candidates][:4] == [
        "w-1.00-0.00",
        "w-0.00-1.00",
        "w-0.10-0.90",
        "w-0.20-0.80",
    ]
    assert candidates[3].preference.values == {"harmless": 0.2, "helpful": 0.8}
    assert len(candidates) == 11


def test_long_names_still_give_short_and_different_ids():
    names = tuple(f"an-objective-with-quite-a-long-name-{i}" for i in range(6))
    candidates = propose(Grid(partitions=3), Space(names))
    assert len({candidate.id for candidate in candidates}) == len(candidates) == comb(8, 5)
    assert all(len(candidate.id) <= 120 and FOLDER.fullmatch(candidate.id) for candidate in candidates)


def test_points_and_partitions_exclude_each_other():
    assert Grid(partitions=3).points is None
    for bad in ({"points": 5, "partitions": 5}, {"points": None}, {"points": None, "partitions": None}):
        with pytest.raises(ValidationError, match="give either points or partitions"):
            Grid(**bad)
    for bad in ({"points": 0}, {"partitions": 0}, {"points": 2.5}):
        with pytest.raises(ValidationError):
            Grid(**bad)


@settings(max_examples=50, deadline=None)
@given(
    objectives=st.integers(1, 6),
    count=st.integers(1, 30),
    alpha=st.sampled_from([1e-3, 0.05, 1.0, 20.0]),
    seed=st.integers(),
)
def test_random_weights_lie_on_the_simplex(objectives, count, alpha, seed):
    candidates = propose(Random(count=count, alpha=alpha), space(objectives), seed=seed)
    drawn = [tuple(candidate.preference.values.values()) for candidate in candidates]
    assert len({candidate.id for candidate in candidates}) == len(set(drawn)) == len(drawn) <= count
    assert len(drawn) == (1 if objectives == 1 else count) or alpha < 0.1, "nothing is trained twice"
    assert propose(Random(count=count, alpha=alpha), space(objectives), seed=seed) == candidates
    for candidate in candidates:
        point = candidate.preference.vector(space(objectives).objectives)
        assert min(point) >= 0 and abs(sum(point) - 1) <= 1e-12
        assert FOLDER.fullmatch(candidate.id)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0, 4.0])
def test_random_weights_have_the_moments_of_the_dirichlet_distribution(alpha):
    n, m = 20_000, 3
    points = [c.preference.vector(space(m).objectives) for c in propose(Random(count=n, alpha=alpha), space(m))]
    variance = (m - 1) / (m * m * (m * alpha + 1))
    for column in zip(*points, strict=True):
        assert fmean(column) == pytest.approx(1 / m, abs=5 * (variance / n) ** 0.5)
        assert fmean((value - 1 / m) ** 2 for value in column) == pytest.approx(variance, rel=0.05)


def test_random_uses_the_given_generator_and_no_other():
    state = __import__("random").getstate()
    first, second = propose(Random(), space(2), seed=1), propose(Random(), space(2), seed=2)
    assert __import__("random").getstate() == state
    assert [c.id for c in first] == [c.id for c in second] and first != second


def test_listed_trains_what_the_user_named():
    named = {
        "balanced": Preference("weights", {"harmless": 0.5, "helpful": 0.5}, name="balanced"),
        "very-safe": Preference("thresholds", {"harmless": 0.9}),
    }
    candidates = propose(Listed(), space(2, **named))
    assert {candidate.id: candidate.preference for candidate in candidates} == named
    assert list(named) == [candidate.id for candidate in candidates]


def test_listed_refuses_nothing_to_do_and_names_that_are_no_folders():
    with pytest.raises(PreferenceError, match="there are none"):
        propose(Listed(), space(2))
    for bad in ("../escape", "..", "", "a/b", ".hidden", "a\\b", "a b", "x" * 101, "nul\0", "line\n"):
        with pytest.raises(PreferenceError, match="cannot name a folder"):
            propose(Listed(), space(2, **{bad: Preference("weights", {"harmless": 1.0, "helpful": 0.0})}))


@pytest.mark.parametrize(("objectives", "trained", "points"), [(2, 3, 11), (2, 2, 7), (3, 6, 21)])
def test_a_soup_trains_a_coarse_grid_and_mixes_what_lies_between(objectives, trained, points):
    search, where = Soup(trained=trained, points=points), space(objectives)
    first = propose(search, where)
    assert len(first) == trained and not any(candidate.mixed for candidate in first)
    assert propose(search, where, first[:1]) == first[1:]
    second = propose(search, where, first)
    assert all(candidate.mixed and candidate.id.startswith("mix-") for candidate in second)
    both = [tuple(candidate.preference.values.values()) for candidate in first + second]
    assert len(set(both)) == len(both)
    assert set(both) >= {tuple(c.preference.values.values()) for c in propose(Grid(points=points), where)}
    assert propose(search, where, first + second) == []


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_a_soup_mixes_nothing_for_weights_that_its_trained_candidates_do_not_enclose(status):
    where = space(2)
    both, alone, other = propose(Soup(trained=3, points=5), where), Grid(points=2), []
    other = [candidate for candidate in both if candidate.preference.values["harmless"] != 1.0]
    history = [Outcome(candidate.id, "done", candidate.preference) for candidate in other]
    gone = next(candidate for candidate in both if candidate not in other)
    history.append(Outcome(gone.id, status, gone.preference, error="boom"))
    mixed = list(Soup(trained=3, points=5).propose(where, history, Generator(0)))
    assert [candidate.preference.values["harmless"] for candidate in mixed] == [0.25]
    one = [Outcome(candidate.id, "failed", candidate.preference, error="boom") for candidate in propose(alone, where)]
    assert list(Soup(trained=2, points=5).propose(where, one, Generator(0))) == []


def test_a_soup_of_fewer_points_than_are_trained_is_refused():
    with pytest.raises(ValidationError, match="must be at least trained"):
        Soup(trained=5, points=3)

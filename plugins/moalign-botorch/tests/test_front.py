"""How much of a front whose shape is known the search finds, against an even grid of weights."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from random import Random

from made_up import NAMES, candidate, driven, outcome, space
from moalign.api import hypervolume, values

from moalign_botorch.bayesian import Bayesian

REFERENCE = -0.1
QUICK = {"samples": 16, "raw": 32, "restarts": 1}


def lattice(objectives, partitions):
    """All weights that are multiples of 1 / partitions."""
    if objectives == 1:
        return [(partitions,)]
    return [(k, *rest) for k in range(partitions + 1) for rest in lattice(objectives - 1, partitions - k)]


def grid(objectives, partitions, sizes):
    weights = [[step / partitions for step in steps] for steps in lattice(objectives, partitions)]
    assert len(weights) == comb(partitions + objectives - 1, objectives - 1)
    return volume([outcome(candidate(*each), sizes) for each in weights])


def volume(history):
    objectives = len(history[0].preference.values)
    return hypervolume([values(each, space(objectives)) for each in history], [REFERENCE] * objectives)


def test_a_front_that_does_not_suit_the_grid_is_found_better():
    """One objective's scores are five times as large, so that equal steps of weights crowd at one end: eight points
    are worth more than the grid's twelve."""
    history = driven(Bayesian(points=8, **QUICK), space(2, REFERENCE), (1.0, 5.0))
    assert volume(history) > grid(2, 11, (1.0, 5.0)) and len(history) == 8


def test_of_three_objectives_eight_points_are_worth_more_than_the_grids_ten_or_eight_that_fill_the_space():
    sizes, where = (1.0, 1.0, 1.0), space(3, REFERENCE)
    history = driven(Bayesian(points=8, batch=2, **QUICK), where, sizes)
    spread = driven(Bayesian(points=8, initial=5), where, sizes)  # all in the first proposal
    assert len(history) == len(spread) == 8
    assert volume(history) > max(grid(3, 3, sizes), volume(spread))


def found_under_noise(known):
    """What the preferences found are truly worth, where scores are off by 0.05, up and down in turn."""
    search, where = Bayesian(points=8, **QUICK), space(2, REFERENCE)
    history, true = [], []
    while proposed := search.propose(where, tuple(history), Random(5)):
        for each in proposed:
            exact = outcome(each, (1.0, 1.0), stderr=0.05 if known else None)
            off = 0.05 if len(true) % 2 else -0.05
            scores = {name: exact.scores[name] + off * (-1) ** i for i, name in enumerate(NAMES[:2])}
            history.append(replace(exact, scores=scores))
            true.append(exact)
    return volume(true)


def test_noise_costs_little_where_it_is_known():
    """No less than the even grid of as many points finds, which suits this front, and more than without the errors."""
    known = found_under_noise(known=True)
    assert known >= grid(2, 7, (1.0, 1.0))
    assert known > found_under_noise(known=False)

"""How much of a front whose shape is known the search finds, against an even grid of weights."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from random import Random

import pytest
from made_up import NAMES, candidate, driven, outcome, space
from moalign.api import hypervolume, values

from moalign_botorch.bayesian import Bayesian

REFERENCE = -0.1


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


@pytest.mark.parametrize(("objectives", "partitions"), [(2, 7), (3, 3)])
def test_a_front_that_suits_the_grid_is_found_as_well(objectives, partitions):
    """Not below the grid of as many points by more than half a step: half of what the next coarser grid lacks."""
    sizes = [1.0] * objectives
    points = comb(partitions + objectives - 1, objectives - 1)
    even, coarser = grid(objectives, partitions, sizes), grid(objectives, partitions - 1, sizes)
    history = driven(Bayesian(points=points, batch=2), space(objectives, REFERENCE), sizes)
    assert len(history) == points
    assert volume(history) >= even - (even - coarser) / 2


def test_a_front_that_does_not_suit_the_grid_is_found_better():
    """One objective's scores are five times as large, so that equal steps of weights crowd at one end: eight points
    are worth more than the grid's twelve."""
    history = driven(Bayesian(points=8), space(2, REFERENCE), (1.0, 5.0))
    assert volume(history) > grid(2, 11, (1.0, 5.0)) and len(history) == 8


def test_noise_costs_little_where_it_is_known():
    """Scores off by their standard errors, here 0.05 up and down in turn; judged by what is true."""
    sizes, search, where = (1.0, 1.0), Bayesian(points=8), space(2, REFERENCE)
    history, true = [], []
    while proposed := search.propose(where, tuple(history), Random(5)):
        for each in proposed:
            exact = outcome(each, sizes, stderr=0.05)
            sign = 1 if len(true) % 2 else -1
            true.append(exact)
            scores = {name: exact.scores[name] + sign * 0.05 * (-1) ** i for i, name in enumerate(NAMES[:2])}
            history.append(replace(exact, scores=scores))
    assert volume(true) >= grid(2, 5, sizes)

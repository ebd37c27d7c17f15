"""Fronts of points, and what a training for weights or thresholds would find on them, for tests of searches."""

from __future__ import annotations

from random import Random

import numpy as np

from moalign.api import Candidate, Outcome, Preference, Space

NAMES = ("a", "b", "c", "d", "e")


def space(objectives=2, **known):
    return Space(NAMES[:objectives], steps=100, **known)


def done(id, scores, preference=None, kl=None, **more):
    named = dict(zip(NAMES, scores, strict=False))
    equal = Preference("weights", dict.fromkeys(named, 1 / len(named)))
    return Outcome(id, "done", preference or equal, scores=named, kl=kl, **more)


def solver(front):
    """What training would find: for weights or thresholds the best point of a finite front [n,M]."""

    def solve(candidate: Candidate) -> Outcome:
        names = NAMES[: front.shape[1]]
        wanted = np.array(candidate.preference.vector(names))
        if candidate.preference.kind == "weights":
            best = int((front @ wanted).argmax())
        else:
            bounded = ~np.isnan(wanted)
            short = np.maximum(wanted[bounded] - front[:, bounded] - 1e-12, 0).sum(1)
            best = int(np.lexsort((-front[:, ~bounded].sum(1), short))[0])
        return done(candidate.id, front[best].tolist(), candidate.preference, changes=candidate.changes)

    return solve


def driven(search, where, solve, history=()):
    """All rounds of the search to its end: the history, and what was proposed in each round."""
    history, rounds = list(history), []
    while proposed := search.propose(where, tuple(history), Random(0)):
        assert len(history) < 500
        rounds.append(proposed)
        history += [solve(candidate) for candidate in proposed]
    return history, rounds


def sphere(objectives, shift=0.0):
    """A concave front, shifted into negative returns where that is asked for."""
    generator = np.random.default_rng(0)
    points = np.abs(generator.normal(size=(400, objectives)))
    return points / np.linalg.norm(points, axis=1, keepdims=True) - shift


def caved(points=1001):
    """A front whose inner points all lie below the line between its ends: no weights reach them."""
    first = np.linspace(0, 1, points)
    return np.stack([first, (1 - np.sqrt(first)) ** 2], axis=1)

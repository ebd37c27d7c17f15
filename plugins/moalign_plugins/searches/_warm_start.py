"""Training from the adapter of a finished candidate with near weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import dist

from moalign.api import Candidate, Outcome, Space


def nearest(candidates: Sequence[Candidate], to: Candidate, space: Space) -> Candidate:
    """The candidate with the nearest weights (Euclidean); of equally near ones the first."""
    point = to.preference.vector(space.objectives)
    return min(candidates, key=lambda each: round(dist(each.preference.vector(space.objectives), point), 9))


def warm(candidate: Candidate, history: Sequence[Outcome], space: Space, share: float) -> Candidate:
    """The same from the adapter of the nearest candidate that was trained for weights, with this share of the steps;
    as it is where there is none."""
    done = [
        Candidate(outcome.id, outcome.preference)
        for outcome in history
        if outcome.status == "done" and outcome.kind == "trained" and outcome.preference.kind == "weights"
    ]
    if not done:
        return candidate
    steps = {"train.steps": max(1, round(share * space.steps))}
    return replace(candidate, parents=(nearest(done, candidate, space).id,), changes=steps)

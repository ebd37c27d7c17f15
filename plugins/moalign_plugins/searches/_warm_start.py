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
    done = _trained(history)
    if not done:
        return candidate
    return replace(candidate, parents=(nearest(done, candidate, space).id,), changes=_steps(space, share))


def warm_mix(candidate: Candidate, history: Sequence[Outcome], space: Space, share: float) -> Candidate:
    """The same from a mix of trained candidates, by the shares that make up its weights and are nearest to it; from the
    nearest one where they do not enclose it."""
    shares = _shares(candidate, history, space)
    if shares is None:
        return warm(candidate, history, space, share)
    return replace(candidate, shares=shares, changes=_steps(space, share))


def enclosed(candidate: Candidate, history: Sequence[Outcome], space: Space) -> bool:
    """Whether trained candidates enclose its weights, so that their adapters can be mixed for it; one model is asked
    for whatever there is."""
    return space.conditioned or _shares(candidate, history, space) is not None


def _shares(candidate: Candidate, history: Sequence[Outcome], space: Space) -> dict[str, float] | None:
    """Of trained candidates, whose mean has its weights, the nearest to it; None where they do not enclose it."""
    import numpy as np
    from scipy.optimize import linprog

    done = _trained(history)
    if not done:
        return None
    point = np.array(candidate.preference.vector(space.objectives))
    corners = np.array([each.preference.vector(space.objectives) for each in done])
    system, sides = np.vstack([corners.T, np.ones(len(done))]), np.append(point, 1.0)
    found = linprog(((corners - point) ** 2).sum(1), A_eq=system, b_eq=sides, method="highs-ds")
    if found.status != 0:
        return None
    return {each.id: round(float(part), 9) for each, part in zip(done, found.x, strict=True) if part > 1e-9}


def _trained(history: Sequence[Outcome]) -> list[Candidate]:
    return [
        Candidate(outcome.id, outcome.preference)
        for outcome in history
        if outcome.status == "done" and outcome.kind == "trained" and outcome.preference.kind == "weights"
    ]


def _steps(space: Space, share: float) -> dict[str, int]:
    return {"train.steps": max(1, round(share * space.steps))}

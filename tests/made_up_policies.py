"""Searches driven to their end against policies in closed form, without any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import hypot
from random import Random
from statistics import fmean
from typing import Literal

import numpy as np

from moalign.api import Candidate, Outcome, Search, Space

NAMES = ("concise", "harmless", "helpful", "truthful", "fluent")
Fate = Callable[[Candidate], Literal["done", "failed", "skipped"]]
Score = Callable[[Candidate, Mapping[str, tuple[float, ...]]], Sequence[float]]


def space(objectives: int, **more) -> Space:
    return Space(NAMES[:objectives], steps=100, **more)


def on_ellipsoid(position: Sequence[float], scales: Sequence[float]) -> list[float]:
    """What maximises w . v over v with sum_j (v_j / s_j)^2 <= 1, for w along ``position``; that many times less
    where the positions add up to z, not 1, by a parabola that is 1 at z = 0.9."""
    length, total = hypot(*(w * s for w, s in zip(position, scales, strict=True))), sum(position)
    kept = 1.0 if abs(total - 1) < 1e-9 else 1 - (total - 0.9) ** 2
    return [kept * w * s * s / length for w, s in zip(position, scales, strict=True)]


def ellipsoid(scales: Sequence[float]) -> Score:
    """Trained candidates lie where their weights say, mixes at the sum of their parents' weights by their
    shares, where these are by blocks by the means of these."""

    def score(candidate: Candidate, weights: Mapping[str, tuple[float, ...]]) -> Sequence[float]:
        position = tuple(candidate.preference.values.values())
        if candidate.shares:
            parts = [(fmean(np.atleast_1d(share)), weights[parent]) for parent, share in candidate.shares.items()]
            position = tuple(sum(share * each[k] for share, each in parts) for k in range(len(scales)))
        return on_ellipsoid(position, scales)

    return score


def done(candidate: Candidate, scores: Sequence[float], space: Space) -> Outcome:
    named = dict(zip(space.objectives, scores, strict=True))
    return Outcome(candidate.id, "done", candidate.preference, named, kind=candidate.kind, changes=candidate.changes)


def drive(
    search: Search, space: Space, score: Score, seed: int = 0, fails: Fate = lambda _: "done"
) -> tuple[list[Outcome], list[list[Candidate]]]:
    """The history to the end of the search, and its proposals; ``fails``: what becomes of a candidate."""
    history: list[Outcome] = []
    rounds: list[list[Candidate]] = []
    weights: dict[str, tuple[float, ...]] = {}
    while proposed := list(search.propose(space, tuple(history), Random(seed))):
        rounds.append(proposed)
        assert len(rounds) < 100
        for candidate in proposed:
            weights[candidate.id] = tuple(candidate.preference.values.values())
            status = fails(candidate)
            history.append(
                done(candidate, score(candidate, weights), space)
                if status == "done"
                else Outcome(candidate.id, status, candidate.preference, kind=candidate.kind)
            )
    return history, rounds

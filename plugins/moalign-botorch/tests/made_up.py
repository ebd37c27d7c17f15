"""Outcomes whose front is known: of weights w the point that maximises w . f where sum_j (f_j / size_j)^2 <= 1."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from random import Random

from moalign.api import Candidate, Outcome, Preference, Search, Space

NAMES = ("concise", "harmless", "helpful", "truthful", "witty")


def space(objectives: int, reference: float = -0.1, together: int = 1) -> Space:
    names = NAMES[:objectives]
    return Space(names, together=together, reference_point=dict.fromkeys(names, reference))


def candidate(*weights: float, id: str = "") -> Candidate:
    preference = Preference("weights", dict(zip(NAMES, weights, strict=False)))
    return Candidate(id or "at-" + "-".join(map(str, weights)), preference)


def outcome(asked: Candidate, sizes: Sequence[float], stderr: float | None = None) -> Outcome:
    """f_j = size_j^2 w_j / |size * w|, by Cauchy and Schwarz."""
    weights = asked.preference.values
    scaled = {name: size * weight for (name, weight), size in zip(weights.items(), sizes, strict=True)}
    length = hypot(*scaled.values())
    scores = {name: size * each / length for (name, each), size in zip(scaled.items(), sizes, strict=True)}
    errors = {} if stderr is None else dict.fromkeys(weights, stderr)
    return Outcome(asked.id, "done", asked.preference, scores, errors, changes=asked.changes)


def driven(search: Search, where: Space, sizes: Sequence[float], stderr: float | None = None) -> list[Outcome]:
    """The history when the search is over."""
    history: list[Outcome] = []
    while proposed := search.propose(where, tuple(history), Random(5)):
        history += [outcome(each, sizes, stderr) for each in proposed]
        assert len(history) < 100
    return history

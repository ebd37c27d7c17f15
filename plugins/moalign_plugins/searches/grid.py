"""An even grid of weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from random import Random
from typing import Any

from pydantic import Field, model_validator

from moalign.api import Candidate, ConfigError, Outcome, Preference, Search, Space

_LONGEST = 120  # characters of an id; a file name may have 255 bytes


class Grid(Search):
    """All weight vectors whose entries are multiples of 1 / partitions (Das and Dennis 1998); single objectives first.

    ``partitions`` n gives C(n + M - 1, M - 1) points for M objectives; ``points`` takes the largest n that needs no
    more. With one objective there is one point.
    """

    points: int | None = Field(default=11, ge=1)
    """at most so many candidates"""
    partitions: int | None = Field(default=None, ge=1)
    """steps from weight 0 to weight 1, instead of ``points``"""

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, value: Any) -> Any:
        """``partitions`` alone switches the default of ``points`` off."""
        if isinstance(value, dict) and value.get("partitions") is not None and "points" not in value:
            return {**value, "points": None}
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Grid:
        if (self.points is None) == (self.partitions is None):
            raise ValueError("give either points or partitions")
        return self

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        n = self._partitions(len(space.objectives))
        seen = {outcome.id for outcome in history}
        proposed = []
        for position, steps in enumerate(_lattice(len(space.objectives), n)):
            weights = {name: step / n for name, step in zip(space.objectives, steps, strict=True)}
            candidate = Candidate(_id(weights, n, position), Preference("weights", weights))
            if candidate.id not in seen:
                proposed.append(candidate)
        return proposed

    def _partitions(self, objectives: int) -> int:
        if self.partitions is not None:
            return self.partitions
        assert self.points is not None
        if self.points < objectives:
            raise ConfigError(
                f"search.points: {self.points} points cannot hold one per objective; {objectives} objectives need "
                f"at least {objectives}"
            )
        n = 1
        while objectives > 1 and comb(n + objectives, objectives - 1) <= self.points:
            n += 1
        return n


def _lattice(objectives: int, n: int) -> list[tuple[int, ...]]:
    """All ways to share ``n`` steps among the objectives; first those that give all to one, in the given order."""
    if objectives == 1:
        return [(n,)]
    from pymoo.util.ref_dirs import get_reference_directions

    fractions = get_reference_directions("das-dennis", objectives, n_partitions=n)
    points = [tuple(round(fraction * n) for fraction in row) for row in fractions.tolist()]
    vertices = sorted((point for point in points if n in point), reverse=True)
    return vertices + [point for point in points if n not in point]


def _id(weights: dict[str, float], n: int, position: int) -> str:
    """As ``w-0.70-0.30``: the weights in the order of the objectives, with as many digits as keep neighbours apart."""
    digits = max(2, len(str(n - 1)))
    text = "-".join(["w", *(f"{weight:.{digits}f}" for weight in weights.values())])
    return text if len(text) <= _LONGEST else f"grid-{n}-{position:04d}"

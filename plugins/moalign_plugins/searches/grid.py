"""An even grid of weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from random import Random
from typing import Any, Literal

from pydantic import Field, model_validator

from moalign.api import Candidate, ConfigError, Outcome, Preference, Search, Space
from moalign_plugins.searches._warm_start import nearest, warm

REGISTRATION = {
    "name": "grid",
    "class": "Grid",
    "summary": "an even (Das-Dennis) grid of weights",
}

_LONGEST = 120  # characters of an id; a file name may have 255 bytes


class Grid(Search):
    """All weight vectors whose entries are multiples of 1 / partitions (Das and Dennis 1998); single objectives first.

    ``partitions`` n gives C(n + M - 1, M - 1) points for M objectives; ``points`` takes the largest n that needs no
    more. With one objective there is one point. With ``warm_start: neighbour`` a coarse grid is trained from fresh
    weights, and each of the others starts from the nearest of these that is done, and takes fewer steps; where one
    model is asked for all of them (`condition`), nothing is trained that could start from anything.
    """

    points: int | None = Field(default=11, ge=1)
    """at most so many candidates"""
    partitions: int | None = Field(default=None, ge=1)
    """steps from weight 0 to weight 1, instead of ``points``"""
    warm_start: Literal["neighbour"] | None = None
    """start from the adapter of the nearest finished candidate"""
    fresh: int = Field(default=3, ge=1)
    """with warm_start: at most so many candidates start from fresh weights, but one for each objective does"""
    warm_steps: float = Field(default=0.15, gt=0, le=1)
    """with warm_start: share of train.steps that the others take"""

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
        candidates = self.candidates(space)
        seen = {outcome.id for outcome in history}
        if self.warm_start is None:
            return [candidate for candidate in candidates if candidate.id not in seen]
        fresh = coarse(candidates, self.fresh, space)
        missing = [candidate for candidate in fresh if candidate.id not in seen]
        others = [candidate for candidate in candidates if candidate.id not in seen]
        return missing or [warm(each, history, space, self.warm_steps) for each in others]

    def candidates(self, space: Space) -> list[Candidate]:
        """All points of the grid."""
        n = self._partitions(len(space.objectives))
        made = []
        for position, steps in enumerate(_lattice(len(space.objectives), n)):
            weights = {name: step / n for name, step in zip(space.objectives, steps, strict=True)}
            made.append(Candidate(_id(weights, n, position), Preference("weights", weights)))
        return made

    def _partitions(self, objectives: int) -> int:
        if self.partitions is not None:
            return self.partitions
        assert self.points is not None
        if self.points < objectives:
            raise ConfigError(
                f"search.points: {self.points} cannot hold one candidate per objective; {objectives} objectives need "
                f"at least {objectives}"
            )
        n = 1
        while objectives > 1 and comb(n + objectives, objectives - 1) <= self.points:
            n += 1
        return n


def coarse(candidates: Sequence[Candidate], points: int, space: Space) -> list[Candidate]:
    """Of these candidates those nearest to an even grid of at most so many points, or of one for each objective."""
    grid = Grid(points=max(points, len(space.objectives))).candidates(space)
    chosen = [nearest(candidates, point, space).id for point in grid]
    return [candidate for candidate in candidates if candidate.id in chosen]


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

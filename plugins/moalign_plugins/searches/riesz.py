"""Weights spread evenly over the simplex, any number of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import fsum
from random import Random

from pydantic import Field

from moalign.api import Candidate, ConfigError, Outcome, Preference, Search, Space

REGISTRATION = {
    "name": "riesz",
    "class": "Riesz",
    "summary": "any number of weights, spread evenly by their Riesz energy",
    "paper": "doi:10.1109/TEVC.2020.2992387",
}

_DECIMALS = 9  # beyond them the optimiser's result says nothing


class Riesz(Search):
    """Weights of least Riesz s-energy (Blank, Deb et al. 2021, pymoo): as many as wanted, where ``grid`` has few sizes.

    Each objective alone is among them, and comes first. For two objectives they are evenly spaced; for one there is
    one point. The energy has several minima; which is found depends on ``start`` alone.
    """

    points: int = Field(default=11, ge=1)
    """how many candidates; one for each objective at least"""
    start: int = Field(default=0, ge=0, lt=2**32)
    """seed of the points that the optimiser starts from"""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        seen = {outcome.id for outcome in history}
        return [candidate for candidate in self.candidates(space) if candidate.id not in seen]

    def candidates(self, space: Space) -> list[Candidate]:
        """All points, the single objectives first."""
        names = space.objectives
        if self.points < len(names):
            raise ConfigError(
                f"search.points: {self.points} points cannot hold one per objective; {len(names)} objectives need at "
                f"least {len(names)}"
            )
        rows = directions(len(names), self.points, self.start)
        digits = len(str(len(rows) - 1))
        return [
            Candidate(f"riesz-{place:0{digits}d}", Preference("weights", dict(zip(names, row, strict=True))))
            for place, row in enumerate(rows)
        ]


@lru_cache(maxsize=16)  # seconds of optimisation, and each proposal wants the same
def directions(objectives: int, points: int, start: int) -> tuple[tuple[float, ...], ...]:
    """[points,objectives], rows that are not negative and sum to 1; the unit vectors first, then in rising order."""
    corners = [tuple(float(i == j) for j in range(objectives)) for i in range(objectives)]
    if objectives == 1 or points == objectives:
        return tuple(corners)
    if objectives == 2:
        inner = [(step / (points - 1), 1 - step / (points - 1)) for step in range(1, points - 1)]
        return (*corners, *inner)
    from pymoo.util.ref_dirs import get_reference_directions

    found = [tuple(row) for row in get_reference_directions("energy", objectives, points, seed=start).tolist()]
    for place in range(objectives):  # the energy holds them there, but no optimiser promises it to the last bit
        found.remove(max(found, key=lambda row: row[place]))
    return (*corners, *sorted(_exact(row) for row in found))


def _exact(row: tuple[float, ...]) -> tuple[float, ...]:
    """Rounded, the largest entry making up for it."""
    rounded = [abs(round(value, _DECIMALS)) for value in row]
    largest = rounded.index(max(rounded))
    rounded[largest] = 1.0 - fsum(value for place, value in enumerate(rounded) if place != largest)
    return tuple(rounded)

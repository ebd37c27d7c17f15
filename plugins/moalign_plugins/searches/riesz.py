"""Weights spread evenly over the simplex, any number of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from math import dist, fsum
from random import Random

from pydantic import Field

from moalign.api import Candidate, ConfigError, Outcome, Preference, Search, Space

REGISTRATION = {
    "name": "riesz",
    "class": "Riesz",
    "summary": "any number of weights, spread evenly by their Riesz energy",
    "paper": "doi:10.1109/TEVC.2020.2992387",
}

_DECIMALS = 6  # beyond them the optimiser's result says nothing
_TRIALS = 4  # starts of the optimiser; the best of its results is taken
_POOL = 60  # random points for each that is wanted, among which it starts

Rows = tuple[tuple[float, ...], ...]


class Riesz(Search):
    """Weights of least Riesz s-energy (Blank, Deb et al. 2021, pymoo): as many as wanted, where ``grid`` has few sizes.

    Each objective alone is among them, and comes first. For two objectives they are evenly spaced; for one there is
    one point. The energy has several minima; which is found depends on ``start`` alone.
    """

    points: int = Field(default=11, ge=1)
    """how many candidates; one for each objective at least"""
    start: int = Field(default=0, ge=0, lt=2**32)
    """seed of the points from which the optimiser starts"""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        seen = {outcome.id for outcome in history}
        return [candidate for candidate in self.candidates(space) if candidate.id not in seen]

    def candidates(self, space: Space) -> list[Candidate]:
        """All points, the single objectives first."""
        names = space.objectives
        if self.points < len(names):
            raise ConfigError(
                f"search.points: {self.points} cannot hold one candidate per objective; {len(names)} objectives need "
                f"at least {len(names)}"
            )
        rows = directions(len(names), self.points, self.start)
        digits = len(str(len(rows) - 1))
        return [
            Candidate(f"riesz-{place:0{digits}d}", Preference("weights", dict(zip(names, row, strict=True))))
            for place, row in enumerate(rows)
        ]


@lru_cache(maxsize=16)  # seconds of optimisation, and each proposal wants the same
def directions(objectives: int, points: int, start: int) -> Rows:
    """[points,objectives], rows that are not negative and sum to 1; the unit vectors first, then in rising order."""
    corners = [tuple(float(i == j) for j in range(objectives)) for i in range(objectives)]
    if objectives == 1 or points == objectives:
        return tuple(corners)
    if objectives == 2:
        inner = [(step / (points - 1), 1 - step / (points - 1)) for step in range(1, points - 1)]
        return (*corners, *inner)
    found = min((_solved(objectives, points, start, trial) for trial in range(_TRIALS)), key=_energy)
    return (*corners, *sorted(_exact(row) for row in found if row not in corners))


def _solved(objectives: int, points: int, start: int, trial: int) -> Rows:
    """A minimum near to points that are far from each other; the corners stand still, and are given back exact."""
    import numpy as np
    from pymoo.util.ref_dirs.energy import RieszEnergyReferenceDirectionFactory

    pool = np.random.default_rng([start, trial]).dirichlet(np.ones(objectives), size=_POOL * points)
    chosen = [*np.eye(objectives)]
    while len(chosen) < points:
        distances = np.min([np.linalg.norm(pool - one, axis=1) for one in chosen], axis=0)
        chosen.append(pool[int(distances.argmax())])
    solver = RieszEnergyReferenceDirectionFactory(objectives, points, X=np.array(chosen), freeze_edges=True)
    rows = [tuple(row) for row in solver.do().tolist()]
    for place in range(objectives):
        corner = max(range(len(rows)), key=lambda one: rows[one][place])
        rows[corner] = tuple(float(place == other) for other in range(objectives))
    return tuple(rows)


def _energy(rows: Rows) -> float:
    """Sum over all pairs of distance^-s, with s = 2 M as pymoo has it."""
    return round(fsum(dist(one, other) ** (-2 * len(one)) for one, other in combinations(rows, 2)), _DECIMALS)


def _exact(row: tuple[float, ...]) -> tuple[float, ...]:
    """Rounded, the largest entry making up for it."""
    rounded = [abs(round(value, _DECIMALS)) for value in row]
    largest = rounded.index(max(rounded))
    rounded[largest] = 1.0 - fsum(value for place, value in enumerate(rounded) if place != largest)
    return tuple(rounded)

"""Weights from a low-discrepancy sequence: any first part of it covers the simplex evenly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

from pydantic import Field

from moalign.api import Candidate, Outcome, Preference, Search, Space

REGISTRATION = {
    "name": "sobol",
    "class": "Sobol",
    "summary": "weights from a scrambled Sobol sequence; more of them keep the first ones",
    "paper": "doi:10.1016/0041-5553(67)90144-9",
}


class Sobol(Search):
    """``count`` weights of a Sobol sequence, scrambled (Owen) by the run's seed; more points keep those that are there.

    A point of the cube [0,1]^(M-1) becomes weights as the gaps between its sorted coordinates, 0 and 1. That map keeps
    volumes up to a factor, so that the weights are uniform on the simplex, and it is made of straight pieces. The other
    usual map, normalised logarithms of M coordinates, has a dimension too many: for two objectives evenly spread
    points would no longer be evenly spread weights. With one objective there is one point.
    """

    count: int = Field(default=11, ge=1, le=2**16)
    """how many"""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        seen = {outcome.id for outcome in history}
        names = space.objectives
        rows = [gaps(point) for point in cube(len(names) - 1, self.count, rng)] if len(names) > 1 else [(1.0,)]
        made = [
            Candidate(f"sobol-{place:03d}", Preference("weights", dict(zip(names, row, strict=True))))
            for place, row in enumerate(rows)
        ]
        return [candidate for candidate in made if candidate.id not in seen]


def cube(dimensions: int, count: int, rng: Random) -> list[list[float]]:
    """The first points [count,dimensions] of the sequence in the unit cube, scrambled by one number of ``rng``."""
    import numpy as np
    from scipy.stats import qmc

    generator = np.random.default_rng(rng.getrandbits(64))
    sequence = qmc.Sobol(dimensions, scramble=True, seed=generator)
    found: list[list[float]] = sequence.random_base2(max(0, (count - 1).bit_length())).tolist()
    return found[:count]


def gaps(point: Sequence[float]) -> tuple[float, ...]:
    """[M] not negative, of sum 1: between the sorted coordinates [M-1], from 0 to 1."""
    ends = [0.0, *sorted(point), 1.0]
    return tuple(after - before for before, after in pairwise(ends))

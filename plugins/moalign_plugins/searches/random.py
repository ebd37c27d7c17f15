"""Weights drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from random import Random as Generator

from pydantic import Field

from moalign.api import Candidate, Outcome, Preference, Search, Space

REGISTRATION = {
    "name": "random",
    "class": "Random",
    "summary": "weights drawn from a Dirichlet distribution",
}


class Random(Search):
    """``count`` weight vectors from a symmetric Dirichlet distribution; alpha 1 is uniform on the simplex.

    The generator starts from the same seed at every call, so all ``count`` are drawn again and those in the history
    left out, and so are repeated ones: of one objective there is but one weight, and for small alpha one often has all.
    """

    count: int = Field(default=11, ge=1)
    """how many"""
    alpha: float = Field(default=1.0, ge=1e-3)
    """below 1 towards the corners of the simplex, above 1 towards its middle"""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Generator) -> list[Candidate]:
        seen = {outcome.id for outcome in history}
        digits = len(str(self.count - 1))
        drawn = [(f"random-{i:0{digits}d}", self._draw(space.objectives, rng)) for i in range(self.count)]
        different = {tuple(values.values()): (id, values) for id, values in reversed(drawn)}  # the first of each
        return [
            Candidate(id, Preference("weights", values))
            for id, values in sorted(different.values(), key=lambda pair: pair[0])
            if id not in seen
        ]

    def _draw(self, objectives: tuple[str, ...], rng: Generator) -> dict[str, float]:
        """Normalised gamma variables, in logarithms, since for small alpha most of them are below the smallest float.

        If G has shape alpha + 1 and U is uniform, then G * U^(1 / alpha) has shape alpha.
        """
        logs = [log(rng.gammavariate(self.alpha + 1, 1)) + log(1 - rng.random()) / self.alpha for _ in objectives]
        gammas = [exp(value - max(logs)) for value in logs]
        return {name: gamma / sum(gammas) for name, gamma in zip(objectives, gammas, strict=True)}

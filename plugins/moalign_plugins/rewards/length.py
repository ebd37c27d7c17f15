"""Shorter is better, or the nearer to a number of words."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from moalign.api import Reward, Sample

REGISTRATION = {
    "name": "length",
    "class": "Length",
    "summary": "words in the response, negated: shorter is better; with a target, the words away from it",
}


class Length(Reward):
    """Minus the number of words (runs of non-space characters) by which the response is longer than is free.

    Larger is shorter: ``direction: max``, the default, trains for short responses. With ``target`` minus the number of
    words between the response's length and the target, on either side of it.
    """

    free: int = Field(default=0, ge=0)
    """words that cost nothing: a soft cap"""
    target: int | None = Field(default=None, ge=0)
    """the best number of words; ``free`` is then how far from it nothing is lost"""

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        return [self._score(len(sample.response.split())) for sample in samples]

    def _score(self, words: int) -> float:
        excess = words if self.target is None else abs(words - self.target)
        return -float(max(0, excess - self.free))

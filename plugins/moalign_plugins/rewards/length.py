"""Shorter is better."""

from __future__ import annotations

from collections.abc import Sequence

from moalign.api import Reward, Sample

REGISTRATION = {
    "name": "length",
    "class": "Length",
    "summary": "words in the response, negated: shorter is better",
}


class Length(Reward):
    """Minus the number of words (runs of non-space characters) in the response."""

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        return [-float(len(sample.response.split())) for sample in samples]

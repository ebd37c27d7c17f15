"""How much of a response is left when its repetition is taken out."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from moalign.api import Reward, Sample
from pydantic import Field


class Compressibility(Reward):
    """Bytes after deflate over bytes before, so that saying the same again costs; abstains on an empty response.

    The inverse of the compression ratio of arXiv:2403.00553, there of a whole set of texts. Longer texts compress
    better, and a few words come out above 1: it compares responses of like length.
    """

    level: int = Field(default=9, ge=1, le=9)
    """effort of the compression"""

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        return [self._share_left(sample.response.encode()) for sample in samples]

    def _share_left(self, text: bytes) -> float | None:
        return len(zlib.compress(text, self.level, wbits=-zlib.MAX_WBITS)) / len(text) if text else None

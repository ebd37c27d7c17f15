"""DNO's pairs: a clear difference, and a good winner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from moalign.api import Filter, Kept, Sampled

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "margin",
    "class": "Margin",
    "summary": "pairs whose combined rewards differ by enough, and whose chosen response is good enough (DNO)",
    "paper": "arXiv:2404.03715",
}


class Margin(Filter):
    """Labelled pairs with a difference of ``gap`` or more in combined reward, whose chosen response has ``least``.

    DNO (Rosset et al., arXiv 2404.03715) keeps winners of 5 or more of 6 points with a gap of 2 or more, among its own
    samples and those of a stronger teacher; that there is a teacher is no part of this. The numbers are the paper's
    scale, so they have no default here. ``rollouts.gap`` drops by the difference alone, before the filter sees a pair.
    """

    gap: float = Field(gt=0)
    """least difference of a pair"""
    least: float | None = None
    """least combined reward of the chosen response; none: any"""

    def keep_pairs(self, about: Sampled, pairs: Tensor, generator: Generator) -> Kept:
        chosen, rejected = about.signal[pairs].unbind(1)
        close = (chosen - rejected) < self.gap
        poor = close & False if self.least is None else chosen < self.least
        both = zip(close.tolist(), poor.tolist(), strict=True)
        reasons = tuple("too close" if near else "chosen too poor" if bad else "" for near, bad in both)
        return Kept((~(close | poor)).double(), reasons)

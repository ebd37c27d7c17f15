"""Prompts that are neither too hard nor too easy, as PRIME keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from moalign.api import Filter, Kept, Sampled
from moalign_plugins.filters._right import check_objective, rewards_of

if TYPE_CHECKING:
    from torch import Generator

REGISTRATION = {
    "name": "accuracy-band",
    "class": "AccuracyBand",
    "summary": "all responses to the prompts of which a share within bounds is right (PRIME)",
    "paper": "arXiv:2502.01456",
}


class AccuracyBand(Filter):
    """All responses to a prompt, where the share that is right lies in [low, high], both bounds within.

    PRIME (Cui et al., arXiv 2502.01456) keeps 0.2 to 0.8: where all responses are right, or none, they teach nothing
    beside each other. With few samples the share is coarse: of 4 it is 0, 0.25, 0.5, 0.75 or 1.
    """

    objective: str | None = None
    """whose rewards say what is right, before any transform; none: the combined reward"""
    right: float = 1.0
    """a response with so much reward or more is right"""
    low: float = Field(default=0.2, ge=0, le=1)
    """share of right responses below which a prompt is too hard"""
    high: float = Field(default=0.8, ge=0, le=1)
    """share above which it is too easy"""

    @model_validator(mode="after")
    def _ordered(self) -> AccuracyBand:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}, and no share lies between")
        return self

    def check(self, objectives: Sequence[str]) -> None:
        check_objective(self.objective, objectives, "objective")

    def keep_responses(self, about: Sampled, generator: Generator) -> Kept:
        right = (rewards_of(about, self.objective) >= self.right).double()
        _, group, size = about.groups.unique(return_inverse=True, return_counts=True)
        share = (right.new_zeros(len(size)).index_add(0, group, right) / size)[group]
        low, high = share < self.low, share > self.high
        both = zip(low.tolist(), high.tolist(), strict=True)
        reasons = tuple("too hard" if hard else "too easy" if easy else "" for hard, easy in both)
        return Kept((~(low | high)).double(), reasons)

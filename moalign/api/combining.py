"""How the scores of an ensemble's members become one score: one rule, one default, wherever members are asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Combine = Literal["mean", "worst", "uncertainty"]
LAM = 0.1


class Combining(BaseModel):
    """The mean of the members' scores; ``worst``, the smallest one (WCO); or ``uncertainty``, mean - lam * variance
    (UWO), whose divisor is the number of members. arXiv 2310.02743.

    The last two say less than is known of a response, never more: so where larger is better, and only there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    combine: Combine = "mean"
    """of the members: their mean, the worst of them, or mean - lam * variance (uncertainty)"""
    lam: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """of ``combine: uncertainty`` alone: what a unit of variance costs; default: 0.1, as arXiv 2310.02743 has it for
    training (0.5 for the choice of the best of many)"""

    @model_validator(mode="after")
    def _lam_has_a_meaning(self) -> Combining:
        if self.lam is not None and self.combine != "uncertainty":
            raise ValueError(f"lam has no effect with 'combine: {self.combine}', only with 'combine: uncertainty'")
        return self

    def combined(self, scores: Sequence[float]) -> float:
        """Of one response's scores under the members; at least one."""
        mean = math.fsum(scores) / len(scores)
        if self.combine == "worst":
            return min(scores)
        if self.combine == "mean":
            return mean
        lam = LAM if self.lam is None else self.lam
        return mean - lam * math.fsum((score - mean) ** 2 for score in scores) / len(scores)

    def pessimistic(self) -> bool:
        """As ``Reward.pessimistic``."""
        return self.combine != "mean"

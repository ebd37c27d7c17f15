"""Rewards within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from moalign.api import Responses, Transform

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "clip",
    "class": "Clip",
    "summary": "no reward below one bound or above another",
}


class Clip(Transform):
    """min(max(r, low), high). Rewards beyond a bound are all alike, so that nothing is learned from them."""

    pointwise: ClassVar[bool] = True

    low: float | None = -5.0
    """null: none"""
    high: float | None = 5.0
    """null: none"""

    @model_validator(mode="after")
    def _ordered(self) -> Clip:
        if self.low is None and self.high is None:
            raise ValueError("give low or high; without both there is nothing to clip")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low:g}) is above high ({self.high:g})")
        return self

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        return rewards.clamp(self.low, self.high), state

"""Rewards in another unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Responses, Transform

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "scale",
    "class": "Scale",
    "summary": "factor * reward + offset",
}


class Scale(Transform):
    """factor * r + offset, to bring objectives to one scale by numbers that are known."""

    pointwise: ClassVar[bool] = True

    factor: float = Field(default=1.0, gt=0)
    """above 0: which way is better is the objective's `direction`"""
    offset: float = 0.0

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        return self.factor * rewards + self.offset, state

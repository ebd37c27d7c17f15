"""Preference as reward: how likely a response is to beat one of the untouched base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Responses, Transform
from moalign_plugins.transforms._comparison import reference_rewards

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "par",
    "class": "PreferenceAsReward",
    "summary": "mean probability (Bradley-Terry) of being preferred to a response of the base",
    "paper": "arXiv:2502.18770",
}


class PreferenceAsReward(Transform):
    """mean over m of sigmoid(k (r - ref_m)), ref_m the reward of the base's m-th response to the prompt.

    arXiv 2502.18770. Between 0 and 1, steepest around the base's rewards and flat far above them. The mean is one of
    sigmoids, not the sigmoid of a mean. Losses that divide by the deviation within a group see the shape, but not the
    bound. The paper subtracts a penalty on length from r alone; here one that stands before this in the chain meets
    the base's responses as well.
    """

    pointwise: ClassVar[bool] = True

    k: float = Field(default=1.0, gt=0)
    """slope"""
    samples: int = Field(default=10, ge=1, le=10)
    """responses of the base to each prompt"""

    def references(self) -> int:
        return self.samples

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        return (self.k * (rewards[:, None] - reference_rewards(about))).sigmoid().nanmean(1), state

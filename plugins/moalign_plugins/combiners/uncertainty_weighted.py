"""The mean of several estimates of one reward, less their variance."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import Preference
from moalign_plugins.combiners._preferences import needs_equal_weights
from moalign_plugins.combiners._scalarised import Scalarised, wanted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "uncertainty-weighted",
    "class": "UncertaintyWeighted",
    "summary": "mean of an ensemble, whose members are the objectives, less a multiple of their variance",
    "paper": "arXiv:2310.02743",
}


class UncertaintyWeighted(Scalarised):
    """mean_k r_k - lam var_k r_k over the objectives with weight, an ensemble of one reward (UWO). arXiv 2310.02743.

    Members must be in one unit and have equal weights. One that is far above the others lowers the result.
    """

    monotone: ClassVar[bool] = False

    lam: float = Field(default=0.1, ge=0)
    """price of the variance, in units of 1 / reward; the paper has 0.1 for PPO and 0.5 for best-of-n"""
    ddof: Literal[0, 1] = 0
    """the variance of n members has the divisor n - ddof; of a single member it is 0"""

    def check(self, preference: Preference) -> None:
        needs_equal_weights(preference, "uncertainty-weighted")

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        known, weights = wanted(rewards, preference, 0.0)
        member = weights != 0
        count = member.sum(-1)
        mean = known.sum(-1) / count
        squares = ((known - mean[..., None]) * member).square().sum(-1)
        return mean - self.lam * squares / (count - self.ddof).clamp(min=1)

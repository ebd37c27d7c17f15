"""Weighted Chebyshev distance to an ideal point, with a soft maximum."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign_plugins.combiners._ideal_point import TowardsIdeal

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "smooth-chebyshev",
    "class": "SmoothChebyshev",
    "summary": "as chebyshev with log-sum-exp for the maximum, so that the other objectives count a little",
    "paper": "arXiv:2402.19078",
}


class SmoothChebyshev(TowardsIdeal):
    """u = -t log sum_k exp(w_k (z_k - r_k) / t) over the objectives with weight, t the temperature. arXiv 2402.19078.

    Below Chebyshev's u by at most t log n for n objectives with weight, and equal to it as t goes to 0. As t grows,
    u + t log n goes to minus the mean of the weighted shortfalls, which ranks as the weighted sum does.

    On labelled pairs t log sum_k exp(w_k (L_k - ideal_loss_k) / t) is minimised, over the objectives' mean losses: each
    step follows sum_k p_k w_k grad L_k, p the softmax of w_k (L_k - ideal_loss_k) / t at the losses of that very step.
    See OverLosses; the paper's mu is t.
    """

    called: ClassVar[str] = "smooth-chebyshev"

    temperature: float = Field(default=0.1, gt=0)
    """how far below the largest shortfall another one still counts, in units of weight times reward"""

    def reduced(self, shortfalls: Tensor) -> Tensor:
        return -self.temperature * (shortfalls / self.temperature).logsumexp(-1)

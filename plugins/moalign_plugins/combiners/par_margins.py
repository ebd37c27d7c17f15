"""Sigmoids of rewards, weighed, as differences and margins of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign_plugins.combiners._shaped_margins import ShapedMargins

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "par-margins",
    "class": "PARMargins",
    "summary": "pairs compared by weighted sigmoids of rewards: no objective can gain more than its weight",
    "paper": "arXiv:2502.18770",
}


class PARMargins(ShapedMargins):
    """f = sigmoid: the reward is sum_k w_k s(c (r_k - ref_k)). PAR, arXiv 2502.18770, with one reference.

    Each term is the probability (Bradley-Terry) of being preferred to a response of reward ref_k. An objective's share
    in a difference is below its weight, however far apart the rewards are; the paper's mean over several reference
    responses is not to be had of pairs.
    """

    called: ClassVar[str] = "par-margins"

    def bent(self, shifted: Tensor) -> Tensor:
        return shifted.sigmoid()

"""Signed geometric mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Preference
from moalign_plugins.combiners._preferences import needs_weights
from moalign_plugins.combiners._scalarised import Scalarised, wanted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "krc",
    "class": "KRC",
    "summary": "weighted geometric mean of the rewards' sizes, negative unless all are positive",
    "paper": "arXiv:2305.15801",
}


class KRC(Scalarised):
    """sgn prod_k |r_k|^w_k, sgn = 1 where every reward with weight is above 0, else -1. arXiv 2305.15801.

    The paper's n-th root of the product is that of equal weights. It jumps where a sign changes, and where one reward
    is negative, more of another makes it worse: for rewards whose sign means good or bad.
    """

    monotone: ClassVar[bool] = False

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "krc")

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        known, weights = wanted(rewards, preference, 1.0)
        size = (weights * known.abs().log()).sum(-1).exp()
        return size.where((known > 0).all(-1), -size)

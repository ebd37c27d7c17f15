"""The smallest of several estimates of one reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Preference
from moalign_plugins.combiners._losses import OverLosses
from moalign_plugins.combiners._preferences import needs_equal_weights
from moalign_plugins.combiners._scalarised import Scalarised, wanted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "worst-case",
    "class": "WorstCase",
    "summary": "the smallest reward of an ensemble, whose members are the objectives",
    "paper": "arXiv:2310.02743",
}


class WorstCase(OverLosses, Scalarised):
    """min_k r_k over the objectives with weight, which are an ensemble of one reward (WCO). arXiv 2310.02743.

    Members must be in one unit and have equal weights. On labelled pairs the largest of their mean losses is minimised:
    each step follows grad L_k of the objective with the largest (see OverLosses).
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled", "scored", "groups"})
    called: ClassVar[str] = "worst-case"

    def check(self, preference: Preference) -> None:
        needs_equal_weights(preference, "worst-case")

    def total_loss(self, losses: Tensor, preference: Tensor, names: list[str]) -> Tensor:
        return losses.amax()

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return wanted(rewards, preference, float("inf"))[0].amin(-1)

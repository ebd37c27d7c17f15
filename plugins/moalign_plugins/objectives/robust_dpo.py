"""Provably robust direct preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, pair_logits
from moalign_plugins.objectives._pairs import logistic

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "robust-dpo",
    "class": "RobustDPO",
    "summary": "unbiased DPO where labels are turned round at a known rate",
    "paper": "arXiv:2403.00409",
}


class RobustDPO(Objective):
    """[(1 - e) L(z) - e L(-z)] / (1 - 2 e), e = label_smoothing, L = -log sigmoid, z = scale * beta * d - margin.

    d is the log-ratio to the reference, summed over tokens, of the chosen minus that of the rejected response. arXiv
    2403.00409: where labels are turned round with probability e, its mean is the loss of DPO on the right labels. It
    has no lower bound: far on the right side it goes on falling, with a slope of e / (1 - 2 e). The default e is ours:
    give the rate of your data.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""
    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    """rate at which labels are turned round; 0 is DPO"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        logits, rate = pair_logits(batch, terms, self.beta), self.label_smoothing
        return ((1 - rate) * logistic(logits) - rate * logistic(-logits)) / (1 - 2 * rate)

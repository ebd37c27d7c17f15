"""Contrastive preference learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms
from moalign_plugins.objectives._pairs import conservative_difference, discounted, logistic, shifted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "cpl",
    "class": "CPL",
    "summary": "logistic loss on discounted log-probabilities, the rejected ones counting less; no reference",
    "paper": "arXiv:2310.13639",
}


class CPL(Objective):
    """-log sigmoid(z), with z = scale * beta * [S(yw) - lam * S(yl)] - margin and S(y) = sum of discount^t log pi_t.

    arXiv 2310.13639 (conservative CPL) with a response as segment; t counts its tokens from 0. lam below 1 prefers,
    among policies that tell the two responses apart as well, those that make both likelier. At lam 1 without discount
    it is DPO without a reference. The paper's runs begin with cloned behaviour. beta 0.1 and lam 0.5 are of its code,
    for tasks with continuous actions. Where its data have ranks it takes all ordered pairs; here pairs are the data's.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    beta: float = Field(default=0.1, gt=0)
    """the paper's alpha"""
    lam: float = Field(default=0.5, gt=0, le=1)
    """how much the rejected response counts"""
    discount: float = Field(default=1.0, gt=0, le=1)
    """of each token, by how far it is from the response's first"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        sums = discounted(batch, batch.logps, self.discount)
        return logistic(shifted(terms, self.beta, conservative_difference(batch, sums, self.lam)))

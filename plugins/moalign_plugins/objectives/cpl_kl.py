"""Contrastive preference learning, with log-ratios to a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms
from moalign_plugins.objectives._pairs import conservative_difference, discounted, logistic, reference_tokens, shifted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "cpl-kl",
    "class": "CPLKL",
    "summary": "logistic loss on discounted log-ratios, the rejected ones counting less",
    "paper": "arXiv:2310.13639",
}


class CPLKL(Objective):
    """-log sigmoid(z), with z = scale * beta * [S(yw) - lam * S(yl)] - margin and S(y) = sum of discount^t a_t.

    a_t = log pi - log pi_ref of the response's token t, counted from 0. arXiv 2310.13639 with a response as segment;
    its reference is the policy from which training starts. At lam 1 without discount it is DPO. beta 0.2 and lam 0.75
    are of the paper's code, for tasks with continuous actions.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=0.2, gt=0)
    """the paper's alpha"""
    lam: float = Field(default=0.75, gt=0, le=1)
    """how much the rejected response counts"""
    discount: float = Field(default=1.0, gt=0, le=1)
    """of each token, by how far it is from the response's first"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        sums = discounted(batch, batch.logps - reference_tokens(batch), self.discount)
        return logistic(shifted(terms, self.beta, conservative_difference(batch, sums, self.lam)))

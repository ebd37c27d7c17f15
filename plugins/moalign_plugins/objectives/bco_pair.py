"""Binary classifier optimisation of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, log_ratios
from moalign_plugins.objectives._pairs import logistic, of_pairs, refuse_terms

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "bco-pair",
    "class": "BCOPair",
    "summary": "binary cross-entropy of the chosen and of the rejected response, each against the reference",
    "paper": "arXiv:2404.04656",
}


class BCOPair(Objective):
    """-log sigmoid(r(yw)) - log sigmoid(-r(yl)), with r = beta * log-ratio to the reference.

    arXiv 2404.04656 for pairs. The shift by a running mean of rewards, which the paper and TRL's "bco_pair" have, is
    left out, as a loss here knows no batch but its own. It bounds the loss of DPO from above.

    Each response has a term of its own, and there is no pairwise logit that a combiner could scale or shift: terms with
    a scale other than 1 or a margin other than 0 are refused.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        refuse_terms("bco-pair", terms)
        chosen, rejected = of_pairs(batch, self.beta * log_ratios(batch))
        return logistic(chosen) + logistic(-rejected)

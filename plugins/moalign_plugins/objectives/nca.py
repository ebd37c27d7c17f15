"""Noise contrastive alignment of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, log_ratios
from moalign_plugins.objectives._pairs import logistic, of_pairs, refuse_terms

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "nca",
    "class": "NCA",
    "summary": "raises the chosen response and holds down both, each against the reference",
    "paper": "arXiv:2402.05369",
}


class NCA(Objective):
    """-log sigmoid(r(yw)) - [log sigmoid(-r(yw)) + log sigmoid(-r(yl))] / 2.

    r = beta * log-ratio to the reference, summed over tokens. arXiv 2402.05369 for pairs, "nca_pair" in TRL. More than
    the difference of likelihoods is learned: a chosen response by itself is at rest where sigmoid(r) = 2 / 3.

    Each response has a term of its own, and there is no pairwise logit that a combiner could scale or shift: terms with
    a scale other than 1 or a margin other than 0 are refused.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        refuse_terms("nca", terms)
        chosen, rejected = of_pairs(batch, self.beta * log_ratios(batch))
        return logistic(chosen) + 0.5 * logistic(-chosen) + 0.5 * logistic(-rejected)

"""Anchored preference optimisation, down."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, log_ratios
from moalign_plugins.objectives._pairs import of_pairs, refuse_terms

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "apo-down",
    "class": "APODown",
    "summary": "lowers the rejected response, and the chosen one too once the two are apart",
    "paper": "arXiv:2408.06266",
}


class APODown(Objective):
    """sigmoid(r(yw)) + 1 - sigmoid(r(yw) - r(yl)), with r = beta * log-ratio to the reference, summed over tokens.

    arXiv 2408.06266, eq. 8, for chosen responses that are worse than what the model would say: the likelihood of both
    is lowered, at first that of the rejected one alone, and that of the chosen one once the two are apart.

    Each response has a term of its own, and there is no pairwise logit that a combiner could scale or shift: terms with
    a scale other than 1 or a margin other than 0 are refused.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        refuse_terms("apo-down", terms)
        chosen, rejected = of_pairs(batch, self.beta * log_ratios(batch))
        return chosen.sigmoid() + (rejected - chosen).sigmoid()

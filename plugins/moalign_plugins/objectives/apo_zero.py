"""Anchored preference optimisation, zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, log_ratios
from moalign_plugins.objectives._pairs import of_pairs, refuse_terms

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "apo-zero",
    "class": "APOZero",
    "summary": "raises the chosen and lowers the rejected response, each against the reference",
    "paper": "arXiv:2408.06266",
}


class APOZero(Objective):
    """1 - sigmoid(r(yw)) + sigmoid(r(yl)), with r = beta * log-ratio to the reference, summed over tokens.

    arXiv 2408.06266, eq. 7, for chosen responses that are better than what the model would say: their likelihood is
    raised and that of rejected ones lowered, both with a slope that vanishes far from the reference.

    Each response has a term of its own, and there is no pairwise logit that a combiner could scale or shift: terms with
    a scale other than 1 or a margin other than 0 are refused.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        refuse_terms("apo-zero", terms)
        chosen, rejected = of_pairs(batch, self.beta * log_ratios(batch))
        return (-chosen).sigmoid() + rejected.sigmoid()

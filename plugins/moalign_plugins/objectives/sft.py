"""Supervised fine-tuning on the chosen responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, Objective, PairTerms, chosen_logps
from moalign_plugins.objectives._pairs import refuse_terms

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "sft",
    "class": "SFT",
    "summary": "negative log-likelihood of the chosen response; needs no reference",
}


class SFT(Objective):
    """-log pi(chosen response), averaged over its tokens, or summed.

    There is no pairwise logit that a combiner could scale or shift, only a weight per pair: terms with a scale
    other than 1 or a margin other than 0 are refused rather than ignored.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})
    shiftable: ClassVar[bool] = False

    average: bool = True
    """mean over the response's tokens, so that every example counts the same whatever its length; false: the sum"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        refuse_terms("sft", terms)
        return -chosen_logps(batch, mean=self.average)

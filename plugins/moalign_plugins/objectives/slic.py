"""The hinge loss on the pairwise logit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms
from moalign_plugins.objectives._pairs import shifted, weighted_difference

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "slic",
    "class": "SLiC",
    "summary": "hinge loss on the log-ratio difference of a pair, as TRL's hinge",
    "paper": "arXiv:2305.10425",
}


class SLiC(Objective):
    """max(0, 1 - z), with z = scale * beta * d - margin.

    d is the log-ratio to the reference, summed over tokens, of the chosen minus that of the rejected response. A pair
    whose logit is above 1 teaches nothing. The hinge of SLiC-HF (arXiv 2305.10425) on log-ratios, as "hinge" in TRL;
    the paper itself has it on log-probabilities without a reference, beside a likelihood term, which is
    ``reference_weight: 0`` here, without that term.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"reference_weight": frozenset({"reference"})}

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference; 1 / beta is the margin in nats that the loss asks for"""
    reference_weight: float = Field(default=1.0, ge=0)
    """how much of the reference's log-probabilities is subtracted; at 0 no reference is computed"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return (1 - shifted(terms, self.beta, weighted_difference(batch, self.reference_weight))).relu()

"""Direct preference optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms
from moalign_plugins.objectives._pairs import logistic, shifted, weighted_difference

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "dpo",
    "class": "DPO",
    "summary": "direct preference optimisation: logistic loss on the log-ratio difference of a pair",
    "paper": "arXiv:2305.18290",
}


class DPO(Objective):
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), e = label_smoothing, with z = scale * beta * d - margin.

    d is the log-ratio to the reference, summed over tokens, of the chosen minus that of the rejected response.
    arXiv 2305.18290; label smoothing (conservative DPO) as in its authors' code.

    With ``reference_weight`` g it is d = [l(yw) - l(yl)] - g [l_ref(yw) - l_ref(yl)], l the log-probability of a
    response, and reference^g stands for the reference in the minimiser: the smaller g, the less of the reference's
    wrong rankings is left (arXiv 2405.19534). At 0 no reference is computed.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"reference_weight": frozenset({"reference"})}

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """share of the labels that is taken to be wrong"""
    reference_weight: float = Field(default=1.0, ge=0)
    """how much of the reference's log-probabilities is subtracted: 1 is DPO, 0 is without a reference"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        logits = shifted(terms, self.beta, weighted_difference(batch, self.reference_weight))
        return logistic(logits, self.label_smoothing)

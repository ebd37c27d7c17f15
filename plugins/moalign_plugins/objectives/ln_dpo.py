"""Length-normalised direct preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms
from moalign_plugins.objectives._pairs import average_log_ratios, difference, logistic, shifted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "ln-dpo",
    "class": "LengthNormalisedDPO",
    "summary": "DPO on log-ratios averaged over tokens",
    "paper": "arXiv:2407.15229",
}


class LengthNormalisedDPO(Objective):
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), e = label_smoothing, with z = scale * beta * d - margin.

    d = a(yw) / |yw| - a(yl) / |yl|, a the log-ratio to the reference summed over the |y| tokens of a response. arXiv
    2407.15229 (there LN-DPO), "sigmoid_norm" in TRL. It is DPO with beta / L where both responses have L tokens, so
    that beta is of the order of a response's length times that of DPO. The paper's own value is in no source that we
    could read; 5 is what published scripts of OLMo have.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=5.0, gt=0)
    """strength of the penalty towards the reference, in nats per token"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """share of the labels that is taken to be wrong"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        logits = shifted(terms, self.beta, difference(batch, average_log_ratios(batch)))
        return logistic(logits, self.label_smoothing)

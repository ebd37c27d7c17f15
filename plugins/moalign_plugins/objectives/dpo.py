"""Direct preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, pair_logits

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
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """share of the labels that is taken to be wrong"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        from torch.nn.functional import logsigmoid

        logits = pair_logits(batch, terms, self.beta)
        if self.label_smoothing == 0:
            return -logsigmoid(logits)
        return -(1 - self.label_smoothing) * logsigmoid(logits) - self.label_smoothing * logsigmoid(-logits)

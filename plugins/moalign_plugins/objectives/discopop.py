"""Discovered preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, pair_logits
from moalign_plugins.objectives._pairs import logistic

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "discopop",
    "class": "DiscoPOP",
    "summary": "blend of a logistic and an exponential loss, found by search",
    "paper": "arXiv:2406.08414",
}


class DiscoPOP(Objective):
    """(1 - m) * -log sigmoid(z) + m * exp(-z), with m = sigmoid(z / tau) and z = scale * beta * d - margin.

    d is the log-ratio to the reference, summed over tokens, of the chosen minus that of the rejected response. arXiv
    2406.08414, eq. 5 (log-ratio modulated loss), found by a language model's search; tau 0.05 is the paper's. It is not
    convex, and around z = 0 it rises with z. m * exp(-z) is computed as one exponential, finite for every z.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""
    tau: float = Field(default=0.05, gt=0, le=1)
    """logits over which the two losses are blended; above 1 the loss would grow exponentially"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        from torch.nn.functional import logsigmoid

        logits = pair_logits(batch, terms, self.beta)
        blend = logits / self.tau
        return (-blend).sigmoid() * logistic(logits) + (logsigmoid(blend) - logits).exp()

"""Regularised preference optimisation: DPO with a pull towards the chosen responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, chosen_logps, pair_logits
from moalign_plugins.objectives._pairs import logistic

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "rpo",
    "class": "RPO",
    "summary": "DPO with a likelihood term on the chosen response, against displacement",
    "paper": "arXiv:2405.16436",
}


class RPO(Objective):
    """-log sigmoid(z) - eta * beta * log pi(chosen), with z = scale * beta * d - margin. arXiv 2405.16436.

    The log-likelihood is the sum over tokens, as in the paper. ``average`` is the form that its authors' code came
    to prefer: -log sigmoid(z) - eta * mean over tokens of log pi(chosen), without beta; they use eta 0.2 with it.
    A combiner's scale and margin act on z alone, its weight on the whole loss.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""
    eta: float = Field(default=0.005, ge=0)
    """weight of the chosen response's log-likelihood; 0 is DPO"""
    average: bool = False
    """mean over the response's tokens and no factor beta, instead of the sum times beta"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        pull = self.eta if self.average else self.eta * self.beta
        return logistic(pair_logits(batch, terms, self.beta)) - pull * chosen_logps(batch, mean=self.average)

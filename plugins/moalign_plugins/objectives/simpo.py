"""Simple preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms
from moalign_plugins.objectives._pairs import difference, log_probabilities, logistic, shifted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "simpo",
    "class": "SimPO",
    "summary": "logistic loss on average log-probabilities with a target margin; no reference",
    "paper": "arXiv:2405.14734",
}


class SimPO(Objective):
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), e = label_smoothing, z = scale * beta * m - gamma - margin.

    m is the log-probability, averaged over tokens, of the chosen minus that of the rejected response; no reference is
    computed. arXiv 2405.14734, eq. 6. ``gamma`` is that of the paper, and TRL's ``simpo_gamma``; the authors'
    configurations have gamma / beta. It stays outside a combiner's scale: a target for the logit, as the margin.

    beta 2 and gamma 1 are of the authors' configuration for Llama-3-8B base (2 and 1.6 for Mistral-7B base).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    beta: float = Field(default=2.0, gt=0)
    """logit for each nat per token"""
    gamma: float = Field(default=1.0, ge=0)
    """target margin of the logit"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """share of the labels that is taken to be wrong"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        means = log_probabilities(batch, average=True)
        return logistic(shifted(terms, self.beta, difference(batch, means)) - self.gamma, self.label_smoothing)

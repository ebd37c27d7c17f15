"""Contrastive preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, chosen_logps
from moalign_plugins.objectives._pairs import logistic, shifted, weighted_difference

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "cpo",
    "class": "CPO",
    "summary": "logistic loss on log-probabilities and the likelihood of the chosen response; no reference",
    "paper": "arXiv:2401.08417",
}


class CPO(Objective):
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z) - alpha * m(yw), with z = scale * beta * [l(yw) - l(yl)] - margin.

    l is log pi summed over tokens, m its mean over them (``average: false``: l), e = label_smoothing. arXiv 2401.08417,
    eqs. 3 and 4 with alpha 1, the sum and e 0: DPO with a uniform reference, which is not computed, and the likelihood
    of the chosen response instead. TRL's is a mean over the tokens
    of a batch, times ``cpo_alpha``. A combiner's scale and margin act on z alone, its weight on the whole loss.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    beta: float = Field(default=0.1, gt=0)
    """logit for each nat between the two responses"""
    alpha: float = Field(default=1.0, ge=0)
    """weight of the chosen response's log-likelihood"""
    average: bool = True
    """likelihood averaged over the response's tokens; false: its sum"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """share of the labels that is taken to be wrong"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        logits = shifted(terms, self.beta, weighted_difference(batch, 0.0))
        return logistic(logits, self.label_smoothing) - self.alpha * chosen_logps(batch, mean=self.average)

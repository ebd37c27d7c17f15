"""Likelihood of good responses, unlikelihood of the tokens of bad ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms
from moalign_plugins.objectives._pairs import lengths, log_probabilities
from moalign_plugins.objectives._single_responses import Threshold, advantages_of, good

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "unlikelihood",
    "class": "Unlikelihood",
    "summary": "likelihood of good responses, and improbability of each token of bad ones",
    "paper": "arXiv:2302.08582, arXiv:1908.04319",
}

LEAST = 1e-6  # of 1 - p: a token surer than that has no gradient, and costs 13.8


class Unlikelihood(Objective):
    """-log p of each token of a good response, -alpha log(1 - p) of each token of a bad one; good: signal above
    ``threshold``. arXiv 2302.08582, of arXiv 1908.04319.

    1 - p is held at 1e-6 from below. The gradient of -log(1 - p) in log p is p / (1 - p): it grows with the
    probability, and below the bound it is 0, so that a token of which the policy is as sure as that is not unlearned.
    The threshold 0.5 is for labels of 1 and 0; ``mean`` is that of the round, or of the data.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups"})
    shiftable: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    alpha: float = Field(default=1.0, ge=0)
    """what the tokens of bad responses count; 0: ``filtered``"""
    threshold: Threshold = 0.5
    """responses are good whose signal is above this number, or above the mean of their round"""
    average: bool = True
    """mean over the response's tokens; false: their sum"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return (signal * 0 + 1).where(good(signal, self.threshold), -self.alpha)

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        counts = advantages_of(batch)
        missed = -(-batch.logps.expm1()).clamp(min=LEAST).log()  # -log(1 - p); 0 is no log-probability of a token's
        avoiding = (missed.where(batch.mask > 0, 0.0)).sum(-1)
        if self.average:
            avoiding = avoiding / lengths(batch)
        return counts.abs() * (-log_probabilities(batch, average=self.average)).where(counts > 0, avoiding)

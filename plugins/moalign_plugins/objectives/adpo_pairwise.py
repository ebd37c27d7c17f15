"""Anchored direct preference optimisation of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, pair_logits
from moalign_plugins.objectives._pairs import logistic, reward_differences

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "adpo-pairwise",
    "class": "ADPOPairwise",
    "summary": "cross-entropy of a pair's softmax over anchored log-ratios to that over rewards",
    "paper": "arXiv:2510.18913",
}


class ADPOPairwise(Objective):
    """-q1 log p1 - q2 log p2, with p = softmax(u) of u(y) = log-ratio to the reference / tau, q = softmax(r / beta_r).

    arXiv 2510.18913 for the two responses of a pair, the reference being its anchor: with d the log-ratio of the first
    minus that of the second response, p1 = sigmoid(z), z = scale * d / tau - margin, and q1 = sigmoid((r1 - r2) /
    beta_r) of the combiner's reward difference; which response is better does not matter. It is KL(q || p) and the
    entropy of q, 0 in its gradient where p = q: reference * exp(tau * r / beta_r) / Z. So ``tau: T, beta_r: 1`` is
    ``dno`` with beta 1 / T, and beta_r to 0, the label alone, is ``dpo`` with beta 1 / tau.

    Log-probabilities are sums over tokens, nothing is clipped, and rewards are as the combiner has them, neither
    standardised nor centred. tau 0.5 and beta_r 0.3 are of a port to which the author's name is attached, where
    log-probabilities are averages over tokens.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"margins", "reference"})

    tau: float = Field(default=0.5, gt=0)
    """temperature of the policy's log-ratios, in nats"""
    beta_r: float = Field(default=0.3, gt=0)
    """temperature of the rewards, in their units"""

    @property
    def beta(self) -> float:
        """Price of a nat of the log-ratio at the minimiser, in units of the reward, as of other losses on rewards."""
        return self.beta_r / self.tau

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        second_better = (-reward_differences("adpo-pairwise", terms) / self.beta_r).sigmoid()
        return logistic(pair_logits(batch, terms, 1 / self.tau), second_better)

"""Kahneman-Tversky optimisation: single responses, each desirable or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError, log_ratios
from moalign_plugins.objectives._single_responses import Threshold, advantages_of, good

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "kto",
    "class": "KTO",
    "summary": "desirable responses above, undesirable ones below what the policy already gains (unpaired labels)",
    "paper": "arXiv:2402.01306",
}


class KTO(Objective):
    """lambda (1 - sigmoid(s beta (a(y) - z0))), s = 1 and lambda = ``desirable`` where the signal is above
    ``threshold``, else s = -1 and lambda = ``undesirable``.

    a(y) = log pi(y) - log pi_ref(y), summed over tokens. z0 is the reference point, without a gradient: the mean of
    log pi - log pi_ref over the prompts of the step, each with the response to another one, and no less than 0; an
    estimate of KL(pi || reference) that is 0 at the start. arXiv 2402.01306, equations 7 and 8, whose value function
    lambda sigmoid(..) this is taken from lambda. TRL's ``kto`` is the same for the same z0: it takes that from each
    device's batch, and moalign from the whole step, with the next response that is to another prompt.

    ``reference_point: false`` has z0 = 0 and needs no further forward passes: TRL's ``apo_zero_unpaired``, which is
    anchored preference optimisation (arXiv 2408.06266) without pairs.

    The threshold 0.5 is for labels of 1 and 0, of which a weighted sum is above it where those labels prevail. Rewards
    on another scale have a number of their own that parts good from bad, or ``mean``: then a response is desirable
    that is better than those of its round (without rollouts: of the data) are on average. Where one kind is rare the
    paper weighs it up, so that ``desirable`` times the number of its responses is 1 to 4/3 of the other product.

    beta is no price of KL in rewards: with ``evaluate.kl_price: auto`` none is known, so name one there.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "reference"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"reference_point": frozenset({"mismatched"})}
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference: how soon a response's value saturates"""
    desirable: float = Field(default=1.0, ge=0)
    """what a desirable response counts"""
    undesirable: float = Field(default=1.0, ge=0)
    """what an undesirable response counts"""
    threshold: Threshold = 0.5
    """a response is desirable whose signal is above this number, or above the mean of its round"""
    reference_point: bool = True
    """whether a response has to gain more than those to other prompts; false: more than the reference"""

    def kl_price(self) -> float:
        return 0.0  # a reward counts by its side of the threshold alone

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return (signal * 0 + self.desirable).where(good(signal, self.threshold), -self.undesirable)

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        counts = advantages_of(batch)
        gained = log_ratios(batch)
        if self.reference_point:
            if batch.mismatched is None:
                raise PluginError('the loss reads mismatched log-ratios but does not declare "mismatched" in `needs`')
            gained = gained - batch.mismatched.clamp(min=0)
        return counts.abs() * (-counts.sign() * self.beta * gained).sigmoid()

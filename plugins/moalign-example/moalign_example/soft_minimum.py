"""A soft minimum of the rewards, for those who would rather have no objective fail than the mean be high."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, Combiner, PairTerms, PluginError, Preference, PreferenceError
from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor


class SoftMinimum(Combiner):
    """u = -log(sum_j w_j exp(-s r_j)) / s, the certainty equivalent of exponential utility; s is ``sharpness``.

    It goes to the weighted mean as s goes to 0, and to the smallest reward that carries weight as s grows. A constant
    added to all rewards is added to u. It is a function of one response's rewards, not of which of two is better: so
    it works on scored pairs, where losses on reward differences get u(first) - u(second).
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"scored"})

    sharpness: float = Field(default=1.0, gt=0)
    """small: near the weighted mean; large: near the worst reward. In units of 1 / reward"""

    def check(self, preference: Preference) -> None:
        if preference.kind != "weights":
            raise PreferenceError(f"combiner 'soft-minimum' needs weights, not {preference.kind}")

    def pair_terms(self, batch: Batch) -> PairTerms:
        if batch.rewards is None:
            raise PluginError(
                "combiner 'soft-minimum' needs the rewards of responses; use a loss on reward differences"
            )
        total = self.scalarise(batch.rewards, batch.preference)
        difference = total[batch.pairs[:, 0]] - total[batch.pairs[:, 1]]
        one = batch.preference.new_ones(len(batch.pairs))
        return PairTerms(scale=one, margin=0 * one, weight=one, difference=difference)

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        known = rewards.masked_fill(preference == 0, 0.0)  # what carries no weight may be unknown
        return -(preference.log() - self.sharpness * known).logsumexp(-1) / self.sharpness

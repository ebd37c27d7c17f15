"""Rules that are a function of one response's rewards: for sampled responses, and for pairs that are scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, Combiner, PairTerms, PluginError

if TYPE_CHECKING:
    from torch import Tensor


class Scalarised(Combiner):
    """The rule is in ``scalarise``; losses on reward differences get u(first) - u(second)."""

    accepts: ClassVar[frozenset[str]] = frozenset({"scored", "groups"})

    def pair_terms(self, batch: Batch) -> PairTerms:
        if batch.rewards is None:
            who = type(self).__name__
            raise PluginError(f"{who} combines the rewards of responses, not judgements; use a loss on rewards")
        total = self.scalarise(batch.rewards, batch.preference)
        one = batch.preference.new_ones(len(batch.pairs))
        return PairTerms(one, 0 * one, one, total[batch.pairs[:, 0]] - total[batch.pairs[:, 1]])


def weighted_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k r_k, [..., M] and [..., M] -> [...]; a reward without weight may be unknown."""
    return (rewards.masked_fill(weights == 0, 0.0) * weights).sum(-1)


def wanted(rewards: Tensor, preference: Tensor, otherwise: float) -> tuple[Tensor, Tensor]:
    """Both of one shape [..., M], the rewards without weight replaced by ``otherwise``."""
    import torch

    rewards, preference = torch.broadcast_tensors(rewards, preference)
    return rewards.masked_fill(preference == 0, otherwise), preference

"""Pairs decided by one objective after the other, in order of importance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import NonNegativeFloat

from moalign.api import Batch, Combiner, PairTerms, PluginError, Preference, pair_preference
from moalign_plugins.combiners._in_order import decided, levels_of
from moalign_plugins.combiners._preferences import by_objective, needs_weights

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "heron-pairs",
    "class": "HERONPairs",
    "summary": "the most important objective that tells two responses apart decides the pair",
    "paper": "arXiv:2309.02632",
}


class HERONPairs(Combiner):
    """A pair is labelled by the objective of the largest weight that tells its responses apart. arXiv 2309.02632.

    Only where that one finds a difference of no more than ``delta`` the next decides, and so on. Objectives of equal
    weight are compared by their mean, those without weight never. The paper trains a reward model on the decided pairs;
    here the policy's own loss sees them.

    Of labelled pairs, each two responses once for all their judges, the judges' verdicts decide, and with ``delta`` the
    rewards, which the data or rewards must supply; pairs that no objective with weight judged count in neither case. A
    loss on reward differences gets 1 for a pair whose first response wins and -1 for one whose second does. What nobody
    decides has weight 0, and the metrics count it (``pairs_without_weight``).

    Without ``delta`` the comparison is an order, and monotone changes of a reward leave it as it is; with it it may go
    in circles. The paper's margin is a share of a reward's standard deviation over the data: give that product.
    """

    weighs_judges: ClassVar[bool] = True
    merges_judges: ClassVar[bool] = True
    monotone: ClassVar[bool] = False

    delta: NonNegativeFloat | dict[str, NonNegativeFloat] = 0.0
    """differences up to this decide nothing, in the rewards' own unit; one number, or one for each objective"""

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "heron-pairs")
        by_objective(self.delta, preference, "heron-pairs", "delta")

    def needs(self, preference: Preference) -> frozenset[str]:
        return frozenset({"margins"}) if self._compares_rewards else frozenset()

    @property
    def _compares_rewards(self) -> bool:
        """Whether labelled pairs are decided by rewards and not by what their judges found."""
        return any(self.delta.values()) if isinstance(self.delta, Mapping) else self.delta > 0

    def pair_terms(self, batch: Batch) -> PairTerms:
        import torch

        judged = batch.preferred is not None and not self._compares_rewards
        values = _leaning(batch) if judged else batch.margins
        if values is None:
            raise PluginError("combiner 'heron-pairs' compares verdicts or rewards, and the batch has neither")
        verdict = torch.zeros_like(values[:, 0])
        weights, bounds = pair_preference(batch), values.new_tensor(self._bounds(batch))
        for row in weights.unique(dim=0):
            rows = (weights == row).all(1)
            verdict[rows] = decided(levels_of(values[rows], row), levels_of(bounds[None], row)[0])
        one = torch.ones_like(verdict)
        if batch.preferred is None:
            return PairTerms(one, 0 * one, verdict.abs(), verdict)
        verdict = verdict * (batch.preferred.isfinite() & (weights > 0)).any(1)
        return PairTerms(one, 0 * one, (verdict > 0).to(one.dtype), reversed=(verdict < 0).to(one.dtype))

    def _bounds(self, batch: Batch) -> list[float]:
        """delta of each objective."""
        if not isinstance(self.delta, Mapping):
            return [self.delta] * batch.preference.shape[1]
        if not batch.objectives:
            raise PluginError(
                "combiner 'heron-pairs': delta for each objective goes by their names, and nobody says these"
            )
        return [self.delta[name] for name in batch.objectives]


def _leaning(batch: Batch) -> Tensor:
    """Above 0 where an objective's judgements prefer the first response, 0 where it has none, or as many; [P,M]."""
    assert batch.preferred is not None
    return batch.preferred.nan_to_num(0.5) - 0.5

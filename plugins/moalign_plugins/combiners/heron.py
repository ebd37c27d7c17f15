"""Responses compared by one objective after the other, in order of importance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, NonNegativeFloat

from moalign.api import Batch, Combiner, PairTerms, PluginError, Preference, pair_preference
from moalign_plugins.combiners._preferences import by_objective, needs_weights

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "heron",
    "class": "HERON",
    "summary": "the most important objective that differs decides a pair, or each comparison within a prompt",
    "paper": "arXiv:2309.02632",
}


class HERON(Combiner):
    """Comparisons won less those lost, over all others to the same prompt: between -1 and 1. After arXiv 2309.02632.

    Two responses are compared by the objective of the largest weight; only where that differs by no more than the
    margin, by the next. Objectives of equal weight are compared by their mean, those without weight never. The paper
    trains a reward model on the decided pairs; here they are counted. With a margin comparisons may go in circles.

    Pairs are decided in the same way, by labels or rewards. A labelled pair, one for all its judges, counts once in the
    order of the first objective that has a verdict; with ``delta`` the objectives' rewards decide instead. A loss on
    reward differences gets 1 for a pair whose first response wins and -1 for one whose second does. What nobody decides
    has weight 0, and the metrics count it (``pairs_without_weight``).
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled", "scored", "groups"})
    weighs_judges: ClassVar[bool] = True
    merges_judges: ClassVar[bool] = True
    pointwise: ClassVar[bool] = False
    monotone: ClassVar[bool] = False  # with a margin, whose size follows the spread of the round

    margin: float = Field(default=0.0, ge=0)
    """differences up to this many standard deviations of the round (divisor N - 1) decide nothing; of sampled
    responses alone"""
    delta: NonNegativeFloat | dict[str, NonNegativeFloat] = 0.0
    """differences up to this decide nothing, in the rewards' own unit; one number or one for each objective; of pairs
    alone"""

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "heron")
        by_objective(self.delta, preference, "heron", "delta")

    def needs(self, preference: Preference) -> frozenset[str]:
        return frozenset({"margins"}) if self._compares_rewards else frozenset()

    @property
    def _compares_rewards(self) -> bool:
        """Whether labelled pairs are decided by rewards and not by what their judges found."""
        return any(self.delta.values()) if isinstance(self.delta, Mapping) else self.delta > 0

    def pair_terms(self, batch: Batch) -> PairTerms:
        import torch

        if self.margin:
            raise PluginError("combiner 'heron': margin is of a round of sampled responses; of pairs, give delta")
        judged = batch.preferred is not None and not self._compares_rewards
        values = _leaning(batch) if judged else batch.margins
        if values is None:
            raise PluginError("combiner 'heron' compares verdicts or rewards, and the batch has neither")
        verdict = torch.zeros_like(values[:, 0])
        weights, bounds = pair_preference(batch), values.new_tensor(self._bounds(batch))
        for row in weights.unique(dim=0):
            rows = (weights == row).all(1)
            verdict[rows] = _decided(_levels(values[rows], row), _levels(bounds[None], row)[0])
        one = torch.ones_like(verdict)
        if batch.preferred is None:
            return PairTerms(one, 0 * one, verdict.abs(), verdict)
        return PairTerms(one, 0 * one, (verdict > 0).to(one.dtype), reversed=(verdict < 0).to(one.dtype))

    def _bounds(self, batch: Batch) -> list[float]:
        """delta of each objective."""
        if not isinstance(self.delta, Mapping):
            return [self.delta] * batch.preference.shape[1]
        if not batch.objectives:
            raise PluginError("combiner 'heron': delta for each objective goes by their names, and nobody says these")
        return [self.delta[name] for name in batch.objectives]

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        import torch

        if self._compares_rewards:
            raise PluginError("combiner 'heron': delta is of pairs; of sampled responses, give margin")
        signal = torch.zeros_like(rewards[:, 0])
        for group in groups.unique():
            rows = (groups == group).nonzero().squeeze(1)
            levels = _levels(rewards, preference[rows[0]])
            margins = self.margin * (levels.std(0) if len(levels) > 1 else torch.zeros_like(levels[0]))
            signal[rows] = _won(levels[rows], margins) / max(len(rows) - 1, 1)
        return signal


def _levels(rewards: Tensor, weights: Tensor) -> Tensor:
    """The mean reward of the objectives of each weight above 0, the largest weight first; [N,L]."""
    import torch

    values = [value for value in weights.unique().flip(0) if value > 0]
    return torch.stack([rewards[:, weights == value].mean(1) for value in values], dim=1)


def _won(levels: Tensor, margins: Tensor) -> Tensor:
    """Comparisons won less those lost, [G,L] and [L] -> [G]."""
    return _decided(levels[:, None] - levels[None, :], margins).sum(1)


def _decided(differences: Tensor, bounds: Tensor) -> Tensor:
    """1 where the first level beyond its bound is positive, -1 where it is negative, 0 without; [..., L], [L] -> [...].

    Raises PluginError where a difference is unknown of which that depends.
    """
    import torch

    verdict = torch.zeros_like(differences[..., 0])
    for difference, bound in zip(differences.unbind(-1), bounds, strict=True):
        unknown = difference.isnan() & (verdict == 0)
        if bool(unknown.any()):
            raise PluginError("combiner 'heron': a reward that would decide a comparison is unknown")
        verdict = verdict.where(verdict != 0, difference.sign() * (difference.abs() > bound))
    return verdict


def _leaning(batch: Batch) -> Tensor:
    """Above 0 where an objective's judgements prefer the first response, 0 where it has none, or as many; [P,M]."""
    assert batch.preferred is not None
    return batch.preferred.nan_to_num(0.5) - 0.5

"""Thresholds kept by multipliers that learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Combiner, Preference, Round
from moalign_plugins.combiners._preferences import needs_no_direction
from moalign_plugins.combiners._scalarised import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "lagrangian",
    "class": "Lagrangian",
    "summary": "for thresholds: the others are maximised, and what falls short gains weight; weights are summed",
    "paper": "arXiv:2310.12773",
}


class Lagrangian(Combiner):
    """(sum of the free r_j + sum_k m_k (r_k - t_k)) / (1 + sum_k m_k), with multipliers that learn.

    After each round m_k <- max(0, m_k + rate (t_k - mean r_k)), the dual ascent of constrained reinforcement learning
    (as in Safe RLHF, arXiv 2310.12773): t_k are the thresholds, the free objectives those without one. Divided as in
    the code of Safe RLHF the sum stays in the unit of the rewards: else each multiplier that grows makes a nat of KL
    cheaper beside it. A threshold that no policy can reach drives its multiplier up without end, or to ``cap``. The
    round's own means move the multipliers before its responses are judged. Weights are the plain weighted sum,
    without multipliers, so that a search can go on from weights to thresholds.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})
    weighted_sums: ClassVar[bool] = True

    start: float = Field(default=0.0, ge=0)
    """every multiplier in the beginning"""
    rate: float = Field(default=0.5, gt=0)
    """by how much a multiplier grows for a reward that is short by 1, per round"""
    cap: float | None = Field(default=None, gt=0)
    """the largest multiplier; none: no limit"""
    rescale: bool = True
    """divide by 1 + the sum of the multipliers; false: the Lagrangian itself, KL at the price of the free objectives"""

    def check(self, preference: Preference) -> None:
        needs_no_direction(preference, "lagrangian")

    def init(self, preference: Preference) -> Mapping[str, Any]:
        """``bounded``: names, in the order of the objectives; without thresholds nothing is."""
        thresholds = dict(preference.values) if preference.kind == "thresholds" else {}
        multipliers = dict.fromkeys(thresholds, min(self.start, self.cap or self.start))
        return {"bounded": list(thresholds), "thresholds": thresholds, "multipliers": multipliers}

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        means = dict(zip(seen.objectives, seen.rewards.mean(0).tolist(), strict=True))
        multipliers = {
            name: self._projected(multiplier + self.rate * (state["thresholds"][name] - means[name]))
            for name, multiplier in state["multipliers"].items()
        }
        return {**state, "multipliers": multipliers}

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        if not state["bounded"]:
            return weighted_sum(rewards, preference)
        free = preference[0].isnan()
        multipliers, thresholds = (
            rewards.new_tensor([state[key][name] for name in state["bounded"]]) for key in ("multipliers", "thresholds")
        )
        total = rewards[:, free].sum(-1) + ((rewards[:, ~free] - thresholds) * multipliers).sum(-1)
        return total / (1 + multipliers.sum()) if self.rescale else total

    def _projected(self, multiplier: float) -> float:
        return max(0.0, multiplier if self.cap is None else min(multiplier, self.cap))

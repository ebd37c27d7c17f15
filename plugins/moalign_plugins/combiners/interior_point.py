"""Thresholds kept by a logarithmic barrier."""

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
    "name": "interior-point",
    "class": "InteriorPoint",
    "summary": "for thresholds: the other objectives are maximised behind a logarithmic barrier; weights are summed",
    "paper": "arXiv:2410.02236",
}


class InteriorPoint(Combiner):
    """The gradient of sum of the free E[r_j] + (1/t) sum_k log s_k, with the slack s_k = E[r_k] - threshold_k.

    So a response's signal is sum of the free r_j + sum_k m_k r_k with the multipliers m_k = 1 / (t max(s_k, floor)),
    slack and multipliers anew from each round's means before its responses are judged (IPO, arXiv 1910.09615; C-MORL,
    arXiv 2410.02236). Divided by 1 + sum_k m_k it stays in the rewards' unit: at the floor a multiplier is 50, beside
    which KL would cost next to nothing. Weights are the plain weighted sum, so that one run can have both.

    A barrier asks for a start that keeps to the thresholds. One that does not is pushed as hard as at the floor, by
    1 / (t floor). C-MORL's code instead computes log max(s_k, floor), whose gradient below the floor is 0: a threshold,
    once missed, is then given up without a word. There is no option for that.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})
    weighted_sums: ClassVar[bool] = True

    t: float = Field(default=20.0, gt=0)
    """how sharp the barrier is: the larger, the less is given up for slack; in 1 / rewards"""
    floor: float = Field(default=1e-3, gt=0)
    """the slack below which the push grows no more, in rewards"""
    rescale: bool = True
    """divide by 1 + the sum of the multipliers; false: the gradient itself, KL at the price of the free objectives"""

    def check(self, preference: Preference) -> None:
        needs_no_direction(preference, "interior-point")

    def init(self, preference: Preference) -> Mapping[str, Any]:
        """``bounded``: names, in the order of the objectives; without thresholds nothing is."""
        thresholds = dict(preference.values) if preference.kind == "thresholds" else {}
        slack = dict.fromkeys(thresholds, 0.0)  # until a round was seen
        return {
            "bounded": list(thresholds),
            "thresholds": thresholds,
            "slack": slack,
            "multipliers": self._multipliers(slack),
        }

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        means = dict(zip(seen.objectives, seen.rewards.mean(0).tolist(), strict=True))
        slack = {name: means[name] - threshold for name, threshold in state["thresholds"].items()}
        return {**state, "slack": slack, "multipliers": self._multipliers(slack)}

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        if not state["bounded"]:
            return weighted_sum(rewards, preference)
        free = preference[0].isnan()
        multipliers = rewards.new_tensor([state["multipliers"][name] for name in state["bounded"]])
        total = rewards[:, free].sum(-1) + (rewards[:, ~free] * multipliers).sum(-1)
        return total / (1 + multipliers.sum()) if self.rescale else total

    def _multipliers(self, slack: Mapping[str, float]) -> dict[str, float]:
        return {name: 1 / (self.t * max(value, self.floor)) for name, value in slack.items()}

"""Between the nominal reward and the smallest of an uncertainty set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Combiner, Preference
from moalign_plugins.combiners._preferences import needs_equal_weights, needs_objectives
from moalign_plugins.combiners._scalarised import wanted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "reward-robust",
    "class": "RewardRobust",
    "summary": "a nominal reward mixed with the smallest of an ensemble, whose members are the objectives",
    "paper": "arXiv:2409.15360",
}


class RewardRobust(Combiner):
    """alpha r_nominal + (1 - alpha) min_k r_k over the objectives with weight. arXiv 2409.15360.

    The minimum is taken for each response: a lower bound of the paper's, which is one over the members' means. There
    the nominal member of the ensemble is the one of the smallest predicted deviation; here it is named, and counts as
    nominal whether it has weight or not.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})

    nominal: str
    """the objective that is the nominal reward"""
    alpha: float = Field(default=0.4, ge=0, le=1)
    """1: the nominal reward alone; 0: the smallest alone"""

    def check(self, preference: Preference) -> None:
        needs_equal_weights(preference, "reward-robust")
        needs_objectives([self.nominal], preference, "reward-robust", "nominal")

    def init(self, preference: Preference) -> Mapping[str, Any]:
        return {"nominal_column": list(preference.values).index(self.nominal)}

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        nominal, worst = rewards[:, state["nominal_column"]], wanted(rewards, preference, float("inf"))[0].amin(-1)
        return self.alpha * nominal + (1 - self.alpha) * worst

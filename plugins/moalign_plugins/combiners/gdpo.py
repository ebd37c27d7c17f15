"""Each objective normalised within its group before they are weighed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Combiner, Preference
from moalign_plugins._groups import group_deviation, group_mean
from moalign_plugins.combiners._preferences import needs_no_thresholds
from moalign_plugins.combiners._scalarised import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "gdpo",
    "class": "GDPO",
    "summary": "weighted sum after each objective is normalised within the responses to a prompt",
    "paper": "arXiv:2601.05242",
}


class GDPO(Combiner):
    """sum_k w_k (r_k - mean) / (std + eps), mean and std over the responses to the same prompt. arXiv 2601.05242.

    So no objective counts more because its rewards spread more; with `linear` a loss that standardises does so after
    weighing, and the objective of the largest spread decides. The std has the divisor G - 1, and a prompt with one
    response counts 0. A loss that standardises again within the group undoes the relative size of groups that this
    leaves. Directions work too.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})
    pointwise: ClassVar[bool] = False
    monotone: ClassVar[bool] = False  # one reward that grows widens the spread by which all are divided

    eps: float = Field(default=1e-4, gt=0)
    """added to each standard deviation, in the rewards' own unit"""
    whole_round: bool = True
    """normalise the sum once more, over all responses of the round, as the paper does: its size then does not depend on
    the number of objectives"""

    def check(self, preference: Preference) -> None:
        needs_no_thresholds(preference, "gdpo")

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        total = weighted_sum(normalised(rewards, groups, self.eps), preference)
        if not self.whole_round:
            return total
        return normalised(total[:, None], groups.new_zeros(len(groups)), self.eps).squeeze(1)


def normalised(values: Tensor, groups: Tensor, eps: float) -> Tensor:
    """(x - mean) / (std + eps) within the groups, column by column; 0 in a group of one. [N,K] -> [N,K]."""
    return (values - group_mean(values, groups)) / (group_deviation(values, groups) + eps)

"""Log-sigmoid of each objective, which adds up to a logical AND."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Combiner, Preference, Round
from moalign_plugins.combiners._preferences import by_objective, needs_weights
from moalign_plugins.combiners._scalarised import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "log-sigmoid",
    "class": "LogSigmoid",
    "summary": "sum of log-sigmoids of the rewards above a reference: all should be good, and good is enough",
    "paper": "arXiv:2402.00742",
}


class LogSigmoid(Combiner):
    """sum_k w_k log s(c (r_k - ref_k)), the logarithm of prod_k s(...)^w_k: all should be good. arXiv 2402.00742.

    Gains above the reference count ever less, losses below it count linearly. The paper has a reference for each
    prompt, the 85th percentile of the untouched policy's responses; here it is one for each objective: the percentile
    of the first round, which the untouched policy has sampled unless it is trained on from another candidate.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})

    reference: float | dict[str, float] | None = None
    """the reward from which on a response is good enough, one number or one for each objective; without it, from the
    first round"""
    percentile: float = Field(default=85.0, ge=0, le=100)
    """of the first round's rewards, interpolated linearly; where there is no ``reference``"""
    slope: float = Field(default=1.0, gt=0)
    """c, in units of 1 / reward"""

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "log-sigmoid")
        if self.reference is not None:
            by_objective(self.reference, preference, "log-sigmoid", "reference")

    def init(self, preference: Preference) -> Mapping[str, Any]:
        if self.reference is None:
            return {"reference": None}
        return {"reference": by_objective(self.reference, preference, "log-sigmoid", "reference")}

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        if state["reference"] is not None:
            return state
        return {"reference": seen.rewards.quantile(self.percentile / 100, dim=0).tolist()}

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        from torch.nn.functional import logsigmoid

        return weighted_sum(logsigmoid(self.slope * (rewards - rewards.new_tensor(state["reference"]))), preference)

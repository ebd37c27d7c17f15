"""Weights that move over the rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Combiner, Preference, PreferenceError, Round
from moalign_plugins.combiners._preferences import needs_objectives, needs_weights
from moalign_plugins.combiners._scalarised import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "schedule",
    "class": "Schedule",
    "summary": "weighted sum whose weights go linearly, round by round, from a common start to the preference",
}


class Schedule(Combiner):
    """sum_k w_k r_k with w = start + (preference - start) min(round / rounds, 1): the preference from ``rounds`` on."""

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})
    weighted_sums: ClassVar[bool] = True

    rounds: int = Field(default=4, ge=1)
    """after so many rounds of sampled responses the weights are those of the preference"""
    start: dict[str, float] | None = None
    """weights of the first round, which add up to 1; without it, equal ones"""

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "schedule")
        if self.start is None:
            return
        needs_objectives(self.start, preference, "schedule", "start")
        total = math.fsum(self.start.values())
        if min(self.start.values(), default=-1.0) < 0 or abs(total - 1) > 1e-6:
            raise PreferenceError(
                f"combiner 'schedule', start: the weights must not be negative and add up to 1, not {total:g}"
            )

    def init(self, preference: Preference) -> Mapping[str, Any]:
        names = list(preference.values)
        start = dict.fromkeys(names, 1 / len(names)) if self.start is None else self.start
        first = {name: start.get(name, 0.0) for name in names}
        return {"objectives": names, "first": list(first.values()), "last": list(preference.values.values())}

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        share = min(seen.number / self.rounds, 1.0)
        moved = [(1 - share) * first + share * last for first, last in zip(state["first"], state["last"], strict=True)]
        return {**state, "weights": dict(zip(state["objectives"], moved, strict=True))}

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        weights = rewards.new_tensor([state["weights"][name] for name in state["objectives"]])
        return weighted_sum(rewards, weights)

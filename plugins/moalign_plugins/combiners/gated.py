"""Rewards in order of priority, the lower ones behind a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from moalign.api import Combiner, Preference
from moalign_plugins.combiners._preferences import needs_objectives, needs_weights

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "gated",
    "class": "Gated",
    "summary": "lower rewards count only where the higher ones exceed their thresholds",
    "paper": "arXiv:2508.10548",
}


class Gate(BaseModel):
    """Open where the objective's reward is larger than ``above``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    objective: str
    above: float


class Gated(Combiner):
    """R = w_1 r_1 + [r_1 > v_1] (w_2 r_2 + [r_2 > v_2] (... + sum of the others' w_k r_k)) (G-RA). arXiv 2508.10548.

    A reward at its threshold leaves the gate shut. A gate works whatever its objective's weight. With rewards below 0
    an open gate can cost more than it brings.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})
    monotone: ClassVar[bool] = False

    gates: tuple[Gate, ...] = Field(min_length=1)
    """from the highest priority down: ``[{objective: safe, above: 0.5}]``; the objectives not named come behind all"""

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "gated")
        needs_objectives([gate.objective for gate in self.gates], preference, "gated", "gates")

    def init(self, preference: Preference) -> Mapping[str, Any]:
        names = list(preference.values)
        return {"columns": [names.index(gate.objective) for gate in self.gates]}

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        import torch

        weighted = rewards * preference
        is_open = torch.ones_like(rewards[:, 0], dtype=torch.bool)
        total, behind = torch.zeros_like(rewards[:, 0]), weighted.clone()
        for gate, column in zip(self.gates, state["columns"], strict=True):
            total = total + weighted[:, column] * is_open
            is_open = is_open & (rewards[:, column] > gate.above)
            behind[:, column] = 0.0
        return total + behind.sum(-1) * is_open

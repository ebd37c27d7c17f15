"""Multiplicative penalties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Combiner, PluginError, Preference
from moalign_plugins.combiners._preferences import needs_objectives, needs_weights

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "product",
    "class": "Product",
    "summary": "a gain times factors between 0 and 1, so that one violation cannot be made up for",
    "paper": "arXiv:2504.17838",
}


class Product(Combiner):
    """(sum_j v_j r_j) prod_i p_i^v_i: gains r_j, penalty factors p_i in [0, 1]. arXiv 2504.17838.

    v is the weight times the number of objectives, so that equal weights give the paper's gain * prod p_i, and an
    objective without weight takes no part. Where no gain has weight, the gain is 1. A negative gain would make
    violations pay, and is refused, as factors outside [0, 1] are.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})
    reward_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    penalties: tuple[str, ...] = Field(min_length=1)
    """the objectives that are factors: 1 for a response without fault, 0 for one that is worth nothing"""

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "product")
        needs_objectives(self.penalties, preference, "product", "penalties")

    def init(self, preference: Preference) -> Mapping[str, Any]:
        return {"is_factor": [name in self.penalties for name in preference.values]}

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        counts = preference * preference.shape[-1]
        is_factor = rewards.new_tensor(state["is_factor"]).bool()
        gains, factors = (counts != 0) & ~is_factor, (counts != 0) & is_factor
        outside = factors & ~((rewards >= 0) & (rewards <= 1))
        if bool(outside.any()):
            value = float(rewards[outside][0])
            raise PluginError(f"a penalty is {value:g}; it must be between 0, worth nothing, and 1, without fault")
        gain = (rewards * counts).masked_fill(~gains, 0.0).sum(-1).where(gains.any(-1), 1.0)
        if bool((gain < 0).any()):
            raise PluginError(f"the gain is {float(gain.min()):g}; below 0 a violation would pay. Shift the rewards")
        return gain * (rewards.where(factors, 1.0) ** counts).prod(-1)

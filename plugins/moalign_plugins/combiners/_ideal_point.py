"""What the rules share that measure how far a response's rewards fall short of an ideal point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from moalign.api import PluginError, Preference
from moalign_plugins.combiners._preferences import by_objective, needs_weights
from moalign_plugins.combiners._scalarised import Scalarised, wanted

if TYPE_CHECKING:
    from torch import Tensor


class TowardsIdeal(Scalarised):
    """A function of the weighted shortfalls w_k (z_k - r_k) of the objectives with weight; z is the ideal reward."""

    called: ClassVar[str]

    ideal: float | dict[str, float] = 1.0
    """the best reward that can be had, in the rewards' own unit: one number, or one for each objective (then for
    sampled responses only)"""

    def reduced(self, shortfalls: Tensor) -> Tensor:
        """[..., M], -inf for an objective without weight -> [...]."""
        raise NotImplementedError

    def check(self, preference: Preference) -> None:
        needs_weights(preference, self.called)
        by_objective(self.ideal, preference, self.called, "ideal")

    def init(self, preference: Preference) -> Mapping[str, Any]:
        return {"ideal": by_objective(self.ideal, preference, self.called, "ideal")}

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        if isinstance(self.ideal, Mapping):
            raise PluginError("an ideal for each objective works on sampled responses only; give one number")
        return self.reduced(_shortfalls(rewards, preference, self.ideal))

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return self.reduced(_shortfalls(rewards, preference, rewards.new_tensor(state["ideal"])))


def _shortfalls(rewards: Tensor, preference: Tensor, ideal: Tensor | float) -> Tensor:
    known, weights = wanted(rewards, preference, 0.0)
    return (weights * (ideal - known)).masked_fill(weights == 0, float("-inf"))

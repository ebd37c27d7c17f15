"""What the rules share that measure how far rewards, or losses, fall short of an ideal point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from moalign.api import PluginError, Preference
from moalign_plugins.combiners._losses import OverLosses
from moalign_plugins.combiners._preferences import by_objective, needs_weights
from moalign_plugins.combiners._scalarised import Scalarised, wanted

if TYPE_CHECKING:
    from torch import Tensor


class TowardsIdeal(OverLosses, Scalarised):
    """A function of the weighted shortfalls w_k (z_k - r_k) of the objectives with weight; z is the ideal reward.

    On labelled pairs the shortfalls are w_k (L_k - ideal_loss_k), of the objectives' losses (see OverLosses).
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled", "scored", "groups"})

    ideal: float | dict[str, float] = 1.0
    """the best reward that can be had, in the rewards' own unit: one number, or one for each objective (then for
    sampled responses only)"""
    ideal_loss: float | dict[str, float] = 0.0
    """on labelled pairs: the least loss that can be had, one number or one for each objective"""

    def reduced(self, shortfalls: Tensor) -> Tensor:
        """[..., M], -inf for an objective without weight -> [...]."""
        raise NotImplementedError

    def check(self, preference: Preference) -> None:
        needs_weights(preference, self.called)
        by_objective(self.ideal, preference, self.called, "ideal")
        by_objective(self.ideal_loss, preference, self.called, "ideal_loss")

    def total_loss(self, losses: Tensor, preference: Tensor, names: list[str]) -> Tensor:
        least = self.ideal_loss
        ideal = [least[name] if isinstance(least, Mapping) else least for name in names]
        return -self.reduced(preference * (losses - losses.new_tensor(ideal)))

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

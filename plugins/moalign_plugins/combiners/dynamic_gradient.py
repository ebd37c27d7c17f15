"""Weights that follow how much each objective's gradient helps the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Combiner, Preference, Round
from moalign_plugins.combiners._gradients import wanted_products
from moalign_plugins.combiners._preferences import needs_weights
from moalign_plugins.combiners._scalarised import weighted_sum
from moalign_plugins.combiners._simplex import ascended, floored

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "dynamic-gradient",
    "class": "DynamicGradient",
    "summary": "weighted sum whose weights grow for objectives whose gradients agree with all",
    "paper": "arXiv:2509.11452",
}


class DynamicGradient(Combiner):
    """sum_k w_k r_k, where each round w <- softmax(log w + step I), I_k = sum_j <g_k, g_j>, j = k included.

    arXiv 2509.11452. g_k is the gradient of the loss that objective k alone has, shortened to ``max_norm``. The weights
    begin at the preference; an objective without weight keeps none and takes no part. Identical gradients leave the
    weights as they are, and so do gradients that cancel.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})
    needs_gram: ClassVar[bool] = True

    step: float = Field(default=0.1, gt=0)
    """by how much the logarithm of a weight moves for an influence of 1"""
    max_norm: float | None = Field(default=1.0, gt=0)
    """the length to which each objective's gradient is shortened before they are compared; none: as it is"""
    floor: float = Field(default=0.1, ge=0, lt=1)
    """the share of its first weight that every weight keeps; 0: one objective may take all, as in the paper"""

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "dynamic-gradient")

    def init(self, preference: Preference) -> Mapping[str, Any]:
        first = dict(preference.values)
        return {"objectives": list(first), "first": list(first.values()), "weights": first}

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        first = seen.start.new_tensor(state["first"])
        counts = first > 0
        gram = wanted_products(seen.gram, seen.start, counts)
        if self.max_norm is not None:
            gram = shortened(gram, self.max_norm)
        weights = self._weights(state, seen.start)
        moved = weights.clone()
        moved[counts] = floored(ascended(weights[counts], gram.sum(1), self.step), self.floor * first[counts])
        return {**state, "weights": dict(zip(state["objectives"], moved.tolist(), strict=True))}

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return weighted_sum(rewards, self._weights(state, rewards))

    def _weights(self, state: Mapping[str, Any], like: Tensor) -> Tensor:
        return like.new_tensor([state["weights"][name] for name in state["objectives"]])


def shortened(gram: Tensor, longest: float) -> Tensor:
    """The inner products of gradients that are cut to the length ``longest``; [M,M] -> [M,M]."""
    factors = (longest / gram.diagonal().clamp(min=0).sqrt()).clamp(max=1.0)
    return factors[:, None] * gram * factors[None, :]

"""Rewards with mean 0 and deviation 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from moalign.api import Responses, Transform

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "whiten",
    "class": "Whiten",
    "summary": "less the mean and over the standard deviation: of the group, the round or all rounds so far",
}


class Whiten(Transform):
    """(r - mean) / (deviation + epsilon).

    The deviation has the divisor n - 1, and is 0 for a single reward. Rewards that are all alike become exactly 0. The
    statistics ``over`` "running" are those of all responses of the candidate's rounds up to this one (Chan's update).

    Within each objective before they are combined: the weights of a preference then count on one scale, but this is not
    the same as standardising the weighted sum.
    """

    over: Literal["group", "batch", "running"] = "group"
    """the responses to the same prompt, all of the round, or all so far"""
    epsilon: float = Field(default=1e-4, ge=1e-12)
    """in units of the reward: what varies by much less is not blown up"""

    def init(self) -> Mapping[str, Any]:
        return {"count": 0, "mean": 0.0, "squares": 0.0} if self.over == "running" else {}

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        groups = about.groups if self.over == "group" else about.groups.new_zeros(about.groups.shape)
        count, mean, squares = _statistics(rewards, groups)
        if self.over == "running":
            state = _together(state, len(rewards), float(mean[0]), float(squares[0]))
            count, mean, squares = (rewards.new_tensor(state[name]) for name in ("count", "mean", "squares"))
        deviation = (squares / (count - 1).clamp(min=1)).sqrt()
        return (rewards - mean) / (deviation + self.epsilon), state


def _statistics(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the group of each response, [N]: how many, mean, and the sum of squared distances from it.

    Distances are taken from the group's largest reward, so that equal rewards have exactly their own value as the mean.
    """
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    count = sizes.to(rewards)
    largest = rewards.new_zeros(len(sizes)).scatter_reduce(0, index, rewards, "amax", include_self=False)[index]
    mean = largest + (rewards.new_zeros(len(sizes)).index_add(0, index, rewards - largest) / count)[index]
    squares = rewards.new_zeros(len(sizes)).index_add(0, index, (rewards - mean) ** 2)
    return count[index], mean, squares[index]


def _together(state: Mapping[str, Any], count: int, mean: float, squares: float) -> dict[str, Any]:
    """The statistics of what the state has seen and of these."""
    total = state["count"] + count
    apart = mean - state["mean"] if state["count"] else 0.0
    return {
        "count": total,
        "mean": state["mean"] + apart * count / total if state["count"] else mean,
        "squares": state["squares"] + squares + apart**2 * state["count"] * count / total,
    }

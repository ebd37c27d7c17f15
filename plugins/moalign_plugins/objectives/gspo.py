"""Group sequence policy optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from moalign.api import Batch
from moalign_plugins.objectives._group_relative import GroupRelative
from moalign_plugins.objectives._policy_gradient import Positive

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "gspo",
    "class": "GSPO",
    "summary": "clipped policy gradient with one ratio for each response: that of its probabilities, per token",
    "paper": "arXiv:2507.18071",
}


class GSPO(GroupRelative):
    """-min(s A, clip(s) A) with s = (pi(y) / pi_old(y))^(1/|y|), for each response at once. arXiv 2507.18071.

    The logarithm of s is the mean over tokens of the log-ratio, so that its bounds are much closer to 1 than those of a
    token. At the policy that sampled the responses the gradient is GRPO's, and so are advantages and KL.
    """

    length: Literal["response"] = "response"
    """what the sum over a response's tokens is divided by: their number, which is part of the method"""
    epsilon_low: Annotated[float, Field(gt=0, le=1)] | None = 3e-4
    """a response worse than the mean counts no more once s is below 1 - epsilon_low; none: it always counts"""
    epsilon_high: Positive | None = 4e-4
    """the same for better responses, above 1 + epsilon_high"""

    def log_ratio(self, batch: Batch) -> Tensor:
        """The mean over the response, at each of its tokens; [N,T]."""
        means = self.log_ratio_to_old(batch).sum(-1) / batch.mask.sum(-1).clamp(min=1)
        return means[:, None] * batch.mask

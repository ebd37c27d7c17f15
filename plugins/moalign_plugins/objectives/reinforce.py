"""REINFORCE, with the mean of a prompt's responses as baseline or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from moalign_plugins._groups import group_mean
from moalign_plugins.objectives._policy_gradient import PolicyGradient

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "reinforce",
    "class": "REINFORCE",
    "summary": "policy gradient on sampled responses, with the mean over the prompt's responses as baseline, or none",
    "paper": "doi:10.1007/BF00992696",
}


class REINFORCE(PolicyGradient):
    """The advantage is r_i, or r_i less the mean over the responses to the same prompt. Williams 1992.

    Without a baseline the expected gradient is that of E[signal] - beta KL. The mean holds the response's own reward,
    so that with G responses to a prompt it is (G - 1) / G of that (of the KL too where that is in the reward), with far
    less noise; ``rloo`` is without the factor.
    """

    baseline: Literal["mean", "none"] = "mean"
    """what a response's reward is compared with: the mean over all responses to its prompt, or nothing"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        rewards = self.shaped(signal, log_ratios)
        return rewards - group_mean(rewards, groups) if self.baseline == "mean" else rewards.clone()

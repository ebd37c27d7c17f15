"""Reinforced token optimisation: PPO with the token rewards that a policy trained with DPO stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from moalign.api import Tokens
from moalign_plugins.objectives._guided_tokens import GuidedTokens
from moalign_plugins.objectives._policy_gradient import Positive

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "rto",
    "class": "RTO",
    "summary": "PPO that also rewards each token, with the log-ratio of an adapter trained with DPO",
    "paper": "arXiv:2404.18922",
}


class RTO(GuidedTokens):
    """PPO whose token t is rewarded with

    clip(scale (log pi_guide - log pi_ref), -bound, bound) - beta (log pi - log pi_ref) + [t is the last] clip(r, -R, R)

    of the token's log-probabilities, with r the response's combined reward and R ``reward_bound``. arXiv 2404.18922;
    scale 0.05, bound 0.05, beta 0.01 and R 10 are those of its authors' code, which scales first and clips then. The
    last token has the reward also where a response was cut before its end. Without bounds the rewards of a response sum
    to r + scale log(pi_guide(y) / pi_ref(y)) - beta a(y). With ``scale`` 0 it is `ppo`, and no adapter is read.

    The guide's reward is relative to the policy that it was trained from, so the run's reference should be that one:
    the base, unless the guide's run said otherwise. Values, advantages and loss are those of `ppo`; the authors also
    whiten (``whiten: true``), and use a reward model whose scores are normalised.
    """

    scale: float = Field(default=0.05, ge=0)
    """units of the reward per nat of the guide's log-ratio; 0 is PPO"""
    bound: Positive | None = 0.05
    """the most that a token gets or pays for the guide's log-ratio; none: it is not clipped"""
    beta: float = Field(default=0.01, ge=0)
    """price of a nat of KL from the reference, in units of the combined reward"""
    reward_bound: Positive | None = 10.0
    """the largest size of a response's combined reward; none: it is not clipped"""

    def guides(self) -> Mapping[str, str]:
        return super().guides() if self.scale else {}

    def token_rewards(self, signal: Tensor, tokens: Tokens) -> Tensor:
        if self.reward_bound is not None:
            signal = signal.clamp(-self.reward_bound, self.reward_bound)
        rewards = super().token_rewards(signal, tokens)
        if not self.scale:
            return rewards
        guided = self.scale * self.log_ratios_of_guide(tokens)
        return rewards + (guided if self.bound is None else guided.clamp(-self.bound, self.bound))

"""PPO with the scores of a process reward model, clipped and differenced so that more steps are not more reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from moalign.api import Tokens
from moalign_plugins._expressions import Expression
from moalign_plugins.objectives._guided_tokens import GuidedTokens
from moalign_plugins.objectives._policy_gradient import Positive

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "clip-delta",
    "class": "ClipDelta",
    "summary": "PPO with process scores of the steps beside the outcome, clipped and differenced against more of them",
    "paper": "arXiv:2410.15115",
}


class ClipDelta(GuidedTokens):
    """PPO whose step k of K is rewarded with alpha d_k at its last token, beside the response's combined reward:

    c_k = min(p_k - eta, 0)   (Clip);   d_k = c_k - c_{k+1} for k < K - 1,   d_{K-1} = c_{K-1},   d_K = 0   (Delta).

    arXiv 2410.15115. The last step has no process reward, because its score is that of the outcome. From step k on the
    rewards sum to alpha c_k, which is between -alpha eta and 0 however many steps there are, and a step whose score is
    above eta adds nothing. Without Delta the sum over the steps grows with their number. alpha, eta and the formula at
    the end of a response are from memory of the paper: unverified.

    p_k is the probability that the response will be right, as a reward model of the form `implicit-outcome` has it
    after step k: sigmoid(slope * sum of log pi_guide - log pi_ref over the tokens so far), the guide being its adapter,
    such as runs/judge/member-0/adapter, and the reference, which should be the base, what it was trained against.
    With ``alpha`` 0 it is `ppo`, and no adapter is read. Values, advantages and loss are those of `ppo`.
    """

    alpha: float = Field(default=0.1, ge=0)
    """what the process rewards are multiplied by"""
    eta: Annotated[float, Field(gt=0, le=1)] | None = 0.5
    """a step with a larger score is good enough and counts as 0; none: scores are not clipped"""
    delta: bool = True
    """whether a step is rewarded with the difference from the next one; else with its own clipped score"""
    slope: Positive = 0.05
    """beta of the reward model, as it was trained with"""
    step: Expression | None = r"[^\n]+\n*"
    """a regular expression, each match of which is a step, by default a line; none: each token is one"""

    def guides(self) -> Mapping[str, str]:
        return super().guides() if self.alpha else {}

    def passages(self) -> Mapping[str, str]:
        return {"step": self.step} if self.alpha and self.step is not None else {}

    def token_rewards(self, signal: Tensor, tokens: Tokens) -> Tensor:
        rewards = super().token_rewards(signal, tokens)
        return rewards + self.alpha * self.process_rewards(tokens) if self.alpha else rewards

    def process_rewards(self, tokens: Tokens) -> Tensor:
        """d_k at the last token of step k, 0 elsewhere; [N,T]."""
        import torch

        counted, ends = self.scores(tokens), self.ends(tokens)
        if self.eta is not None:
            counted = (counted - self.eta).clamp(max=0)
        found = torch.zeros_like(counted)
        next_one = torch.zeros_like(counted[:, 0])  # c of the step behind, 0 where that is the last
        later = torch.zeros_like(ends[:, 0])  # whether there is a step behind
        for place in reversed(range(counted.shape[1])):
            here = ends[:, place] & later
            found[:, place] = (counted[:, place] - next_one * self.delta) * here
            next_one = counted[:, place].where(here, next_one)
            later = later | ends[:, place]
        return found

    def scores(self, tokens: Tokens) -> Tensor:
        """p after each token: how likely the response is to be right; [N,T]."""
        return (self.slope * self.log_ratios_of_guide(tokens).cumsum(1)).sigmoid()

    def ends(self, tokens: Tokens) -> Tensor:
        """Whether a step ends with the token; bool [N,T]."""
        from torch.nn.functional import pad

        numbers = tokens.mask.cumsum(1) * tokens.mask if self.step is None else tokens.passages["step"]
        return (numbers > 0) & (numbers != pad(numbers[:, 1:], (0, 1)))

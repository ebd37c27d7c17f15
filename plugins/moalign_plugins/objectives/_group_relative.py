"""What GRPO and its kin share: advantages within the group, and the defaults of their papers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from moalign.api import Tokens
from moalign_plugins._groups import group_deviation, group_mean
from moalign_plugins.objectives._policy_gradient import PolicyGradient, Positive

if TYPE_CHECKING:
    from torch import Tensor

TINIEST_DEVIATION = 1e-4  # added to it, as in TRL


class GroupRelative(PolicyGradient):
    """The advantage is (r_i - mean) / (deviation + 1e-4) over the responses to the prompt; divisor G - 1."""

    beta: float = Field(default=0.04, ge=0)
    """price of a nat of KL from the reference, in units of the advantage"""
    kl: Literal["reward", "k2", "k3", "forward"] = "k3"
    """where the KL stands and how it is estimated: in the loss as k2 or k3 of KL(policy || reference), or as k3 of the
    forward KL(reference || policy); or in the reward, where it is standardised with it"""
    length: Literal["none", "response"] | Positive = "response"
    """what the sum over a response's tokens is divided by: nothing; its own number of tokens; or a constant"""
    epsilon_low: Annotated[float, Field(gt=0, le=1)] | None = 0.2
    """a token of a response worse than the mean counts no more once its probability is below 1 - epsilon_low times
    that at sampling; none: it always counts"""
    epsilon_high: Positive | None = 0.2
    """the same for better responses, above 1 + epsilon_high times"""
    standardise: bool = True
    """whether the difference from the mean is divided by the standard deviation"""

    def kl_price(self) -> float:
        """Nothing, where beta is in units of a standardised advantage."""
        return 0.0 if self.standardise and self.kl != "reward" else super().kl_price()

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        rewards = self.shaped(signal, log_ratios)
        centred = rewards - group_mean(rewards, groups)
        return centred / (group_deviation(rewards, groups) + TINIEST_DEVIATION) if self.standardise else centred


class GroupRelativeTokens(GroupRelative):
    """The same for losses that are to know more of a response than its advantage: each token has that, and the rest."""

    needs: ClassVar[frozenset[str]] = GroupRelative.needs | {"token_advantages"}

    def of_responses(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> Tensor:
        """The advantage of each response; [N]."""
        ratios = None
        if tokens.old_logps is not None and tokens.ref_logps is not None:
            ratios = (tokens.old_logps - tokens.ref_logps).sum(-1)
        return self.advantages(signal, groups, ratios)


def at_each_token(values: Tensor, tokens: Tokens) -> Tensor:
    """What is so of a response, for each of its tokens; [N] -> [N,T]."""
    return values[:, None] * tokens.mask

"""Asymmetric policy optimisation."""

from __future__ import annotations

from math import e
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from moalign.api import Batch, TokenAdvantages, Tokens
from moalign_plugins._groups import group_mean
from moalign_plugins.objectives._group_relative import GroupRelativeTokens, at_each_token
from moalign_plugins.objectives._policy_gradient import Positive
from moalign_plugins.objectives._single_responses import good

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "asymmetric-apo",
    "class": "AsymmetricAPO",
    "summary": "GRPO with less KL for good responses to hard prompts, and with length held against wrong ones",
    "paper": "arXiv:2506.21655",
}


class AsymmetricAPO(GroupRelativeTokens):
    """GRPO in which good responses pay less KL where the prompt is hard, and wrong ones pay for length.

    arXiv 2506.21655. A response is right if its signal is above ``threshold``; p is the share of right ones among those
    to a prompt. Divergence shaping by difficulty (DADS): where the advantage is positive and p neither 0 nor 1 the KL
    of the response's tokens counts 1 - exp(-sharpness p), less where the prompt is harder; elsewhere it counts 1.
    Trajectory regularisation (STCR): the negative advantage of a wrong response that is longer than the right ones to
    the prompt are on average, by n tokens, is multiplied by 2 - base^-n, from 1 towards 2. Without a right response
    there is nothing to be longer than. Either is switched off by ``sharpness`` or ``base``.

    All of this is as in the authors' code, where rewards are 1 or 0. With others a wrong response may be better than
    the mean of its prompt, and a positive advantage is never multiplied here. It is another method than anchored
    preference optimisation, of which are ``apo-zero`` and ``apo-down``.
    """

    beta: float = Field(default=1e-3, ge=0)
    """price of a nat of KL from the reference, in units of the advantage"""
    kl: Literal["k3", "forward"] = "forward"
    """the KL in the loss: as k3 of KL(policy || reference), or as k3 of the forward KL(reference || policy)"""
    threshold: float = 0.5
    """a response is right whose signal is above this number"""
    sharpness: Positive | None = e
    """how soon good responses pay the KL in full as prompts become easier; none: all of them do"""
    base: float = Field(default=1.00001, ge=1)
    """how soon length counts against wrong responses; 1: never"""

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        advantages, right = self.of_responses(signal, groups, tokens), good(signal, self.threshold)
        rate, length = group_mean(right.to(signal), groups), tokens.mask.sum(-1)
        share = self.kl_share(advantages, rate)
        factor = self.longer(length - group_mean(length * right, groups) / rate, advantages, right)
        known = {"kl_share": at_each_token(share, tokens)}
        means = {"right": rate, "kl_share": share, "longer": (factor > 1).to(signal)}
        figures = {name: float(values.mean()) for name, values in means.items()}
        return TokenAdvantages(at_each_token(advantages * factor, tokens), known, figures)

    def kl_share(self, advantages: Tensor, rate: Tensor) -> Tensor:
        """What the KL of each response counts, from the share of right responses to its prompt; [N]."""
        if self.sharpness is None:
            return rate * 0 + 1
        freed = (advantages > 0) & (rate > 0) & (rate < 1)
        return (1 - (-self.sharpness * rate).exp()).where(freed, 1.0)

    def longer(self, excess: Tensor, advantages: Tensor, right: Tensor) -> Tensor:
        """What advantages are multiplied by, from how much longer than right ones a response is (NaN: none is); [N]."""
        long = ~right & (excess > 0) & excess.isfinite() & (advantages < 0)
        return (2 - self.base**-excess).where(long, 1.0)

    def token_kl(self, batch: Batch) -> Tensor:
        return super().token_kl(batch) * batch.known["kl_share"]

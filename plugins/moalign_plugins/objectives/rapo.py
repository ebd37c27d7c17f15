"""Rewards-aware policy optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from moalign.api import Batch, TokenAdvantages, Tokens
from moalign_plugins.objectives._distillation import at_tokens, distribution, divergence
from moalign_plugins.objectives._group_relative import GroupRelativeTokens, at_each_token

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "rapo",
    "class": "RAPO",
    "summary": "GRPO with a forward KL from a reference that is flatter where rewards are low (RAPO)",
    "paper": "arXiv:2510.03865",
}


class RAPO(GroupRelativeTokens):
    """GRPO with the price beta KL(anchor || pi) of each token, and the bonus ``entropy``. arXiv 2510.03865.

    The anchor of a response's tokens is proportional to pi_ref^phi over the vocabulary, where phi rises with the
    response's signal from ``flattest``, at ``worst`` or below, to 1, at ``best`` or above, in a straight line: what was
    bad is to stay near a flatter distribution, so that something else is tried. With ``flattest: 1`` the anchor is the
    reference, and the expected gradient that of ``grpo`` with ``kl: forward`` where ``length`` is none or a constant;
    divided by each response's length, the sampled estimate there is biased by tokens that lead to short ones.

    Unverified against the paper, whose text we could not read: phi, of which we know that it rises, to 1 at most; that
    the anchor is of each next token; beta and entropy, whose defaults are ours.

    The KL is exact, over the whole vocabulary, as the anchor has to be normalised over it anyway. The paper's estimate
    from the sampled token, u log u - u + 1 with u = anchor / pi, has the right mean, and the gradient of another thing:
    it leaves out that the sample is drawn from pi. Memory: policy and reference take 4 bytes each for S tokens of a
    pass times V, and the gradient as much again; a smaller train.tokens_per_pass needs less.
    """

    needs: ClassVar[frozenset[str]] = GroupRelativeTokens.needs | {"distributions"}

    beta: float = Field(default=0.04, ge=0)
    """price of a nat of KL(anchor || policy), in units of the advantage"""
    kl: Literal["forward"] = "forward"
    """the KL is the forward one, which is part of the method"""
    flattest: float = Field(default=0.5, ge=0, le=1)
    """the reference's exponent for the worst responses; 1: the reference as it is, 0: all tokens alike"""
    worst: float = 0.0
    """a signal with that exponent"""
    best: float = 1.0
    """a signal with the exponent 1"""

    @model_validator(mode="after")
    def _worst_is_worse(self) -> RAPO:
        if self.worst >= self.best:
            raise ValueError(f"worst ({self.worst:g}) has to be below best ({self.best:g})")
        return self

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        advantages, exponent = self.of_responses(signal, groups, tokens), self.exponent(signal)
        known = {"exponent": at_each_token(exponent, tokens)}
        return TokenAdvantages(at_each_token(advantages, tokens), known, {"exponent": float(exponent.mean())})

    def exponent(self, signal: Tensor) -> Tensor:
        """phi of each response; [N]."""
        reached = ((signal - self.worst) / (self.best - self.worst)).clamp(0, 1)
        return self.flattest + (1 - self.flattest) * reached

    def token_kl(self, batch: Batch) -> Tensor:
        exponent = batch.known["exponent"][batch.mask > 0]
        anchor = (exponent[:, None] * distribution(batch, "reference")).log_softmax(-1)
        return at_tokens(batch, divergence(anchor, distribution(batch, "policy")))

"""GRPO with a bonus for answers that the reference finds consistent with the reasoning before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import PluginError, TokenAdvantages, Tokens
from moalign_plugins._expressions import Expression
from moalign_plugins._groups import group_mean
from moalign_plugins.objectives._group_relative import GroupRelative

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "grpo-care",
    "class": "GRPOCare",
    "summary": "GRPO with a bonus where the reference is sure of a right answer after the response's own reasoning",
    "paper": "arXiv:2506.16141",
}

ROUNDING = 1e-9  # of means; values that are all alike must not be below their own mean


class GRPOCare(GroupRelative):
    """GRPO on r + bonus * r * [eligible and c >= m - margin], with r the response's combined reward.

    c is the response's confidence, exp of the mean log-probability under the reference of the tokens of its answer,
    which stands behind the response's own reasoning; at most ``ceiling``. A response is eligible where r is above
    ``least``, not below the mean of its group, and it has an answer; m is the mean c of the eligible ones of its group,
    and where there is none nobody gets a bonus. arXiv 2506.16141, with the numbers of its authors' code. There a
    response whose answer is not found has confidence 1; here it is not eligible.

    Use it with ``reference: moving-average``, whose defaults are the paper's, so that the reference learns with the
    policy. There is no KL unless ``beta`` says so. r stands for the accuracy, so it should have the accuracy's scale:
    with several objectives that is the weighted sum.
    """

    needs: ClassVar[frozenset[str]] = GroupRelative.needs | {"token_advantages"}

    beta: float = Field(default=0.0, ge=0)
    """price of a nat of KL from the reference, in units of the advantage"""
    answer: Expression = r"(?s)<answer>(.*?)</answer>"
    """a regular expression; the answer is its first group, or all of it without one; the last match counts"""
    bonus: float = Field(default=0.5, ge=0)
    """of an eligible response that is consistent, as a share of its combined reward"""
    margin: float = Field(default=0.01, ge=0)
    """how far below the mean of the eligible ones a confidence may be"""
    ceiling: float = Field(default=0.95, gt=0, le=1)
    """a larger confidence counts no more"""
    least: float = 0.1
    """a response with no more combined reward is not eligible"""

    def passages(self) -> dict[str, str]:
        return {"answer": self.answer}

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        if tokens.old_logps is None or tokens.ref_logps is None:
            raise PluginError('the loss reads log-ratios but does not declare "reference" and "old_logps" in `needs`')
        confidence, answered = self.confidence(tokens.ref_logps, tokens.passages["answer"])
        given = self.consistent(signal, groups, confidence, answered)
        log_ratios = ((tokens.old_logps - tokens.ref_logps) * tokens.mask).sum(-1)
        advantages = self.advantages(signal + self.bonus * signal * given, groups, log_ratios)
        figures = {"answered": float(answered.double().mean()), "consistent": float(given.double().mean())}
        return TokenAdvantages(advantages[:, None] * tokens.mask, figures=figures)

    def confidence(self, logps: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Of each response, [N], and whether it has an answer; ``answers`` [N,T]: in which match each token stands."""
        inside = (answers > 0) & (answers == answers.amax(1, keepdim=True))
        count = inside.sum(1)
        return ((logps * inside).sum(1) / count.clamp(min=1)).exp().clamp(max=self.ceiling), count > 0

    def consistent(self, signal: Tensor, groups: Tensor, confidence: Tensor, answered: Tensor) -> Tensor:
        """Whether each response gets the bonus; bool [N]."""
        mean = group_mean(signal, groups)
        eligible = answered & (signal > self.least) & (signal >= mean - ROUNDING * (1 + mean.abs()))
        share = group_mean(eligible.to(signal), groups)  # where it is 0 nobody asks for the mean of nothing
        least = group_mean(confidence * eligible, groups) / share.where(share > 0, 1.0) - self.margin
        return eligible & (confidence >= least - ROUNDING)

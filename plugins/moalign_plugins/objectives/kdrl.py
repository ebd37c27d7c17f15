"""Knowledge distillation and reinforcement learning at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from moalign.api import Batch, PairTerms, TokenAdvantages, Tokens
from moalign_plugins._groups import group_mean
from moalign_plugins.objectives._group_relative import GroupRelativeTokens, at_each_token
from moalign_plugins.objectives._single_responses import good

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "kdrl",
    "class": "KDRL",
    "summary": "GRPO, and distillation from another adapter on the same samples, with a coefficient that falls",
    "paper": "arXiv:2506.02208",
}


class KDRL(GroupRelativeTokens):
    """GRPO's loss, and b (log pi_teacher - log pi)^2 / 2 of each token that the policy itself has sampled.

    arXiv 2506.02208. This k2 estimate has the gradient of KL(pi || teacher) of each next token, for beginnings as they
    were sampled; k3 without a ratio would have that of the other KL, KL(teacher || pi). The teacher takes the place of
    the reference, to which there is no KL unless ``beta`` says so. b falls from ``distillation`` by
    ``distillation_decrease`` with each round, down to ``distillation_last``: what the paper calls a training step is a
    round of samples. With ``distillation: 0`` it is ``grpo``.

    ``masking`` says who is taught: all responses; "response": those that are wrong; "group": those to prompts without a
    right one. A response is right if its signal is above ``threshold``. The sum over a response's tokens is divided as
    GRPO's is, and the step's mean is over all responses, taught or not; the paper's mean may be over those that are.

    The teacher is an adapter of the run's own base, and not, as in the paper, a larger model. Its log-probabilities are
    found in every step anew, as those of no other round would be of use.
    """

    needs: ClassVar[frozenset[str]] = GroupRelativeTokens.needs - {"reference"}
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {
        **GroupRelativeTokens.needs_with,
        "beta": frozenset({"reference"}),
    }

    teacher: str
    """folder of a trained adapter of the same base model, such as runs/first/candidates/only-helpful; with {candidate}
    in place of the last name, each candidate's own"""
    beta: float = Field(default=0.0, ge=0)
    """price of a nat of KL from the reference, in units of the advantage; 0 as in the paper"""
    distillation: float = Field(default=5e-3, ge=0)
    """b of the first round: price of a nat of KL from the teacher, in units of the advantage"""
    distillation_last: float = Field(default=1e-3, ge=0)
    """b where it falls no more"""
    distillation_decrease: float = Field(default=5e-5, ge=0)
    """by how much b falls from round to round"""
    masking: Literal["none", "response", "group"] = "none"
    """which responses are taught: all; wrong ones; those to prompts that have wrong ones alone"""
    threshold: float = 0.5
    """a response is right whose signal is above this number"""

    @model_validator(mode="after")
    def _falls(self) -> KDRL:
        if 0 < self.distillation < self.distillation_last:
            raise ValueError(
                f"distillation ({self.distillation:g}) must not be below distillation_last ({self.distillation_last:g})"
            )
        return self

    def guides(self) -> Mapping[str, str]:
        return {"teacher": self.teacher} if self.distillation else {}

    def coefficient(self, number: int) -> float:
        """b in that round."""
        lowest = min(self.distillation, self.distillation_last)
        return max(self.distillation - self.distillation_decrease * number, lowest)

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        advantages, right = self.of_responses(signal, groups, tokens), good(signal, self.threshold).to(signal)
        taught, price = self.taught(right, groups), self.coefficient(tokens.number)
        figures = {"right": float(right.mean()), "taught": float(taught.mean()), "distillation": price}
        known = {"distillation": at_each_token(price * taught, tokens)}
        return TokenAdvantages(at_each_token(advantages, tokens), known, figures)

    def taught(self, right: Tensor, groups: Tensor) -> Tensor:
        """1 for responses that are taught, 0 for others; [N]."""
        if self.masking == "none":
            return right * 0 + 1
        return 1 - right if self.masking == "response" else (group_mean(right, groups) == 0).to(right)

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        losses = super().loss(batch, terms)
        if not self.distillation:
            return losses
        k2 = (batch.guides["teacher"] - batch.logps) ** 2 / 2
        return losses + self.over_length((batch.known["distillation"] * k2 * batch.mask).sum(-1), batch)

"""Policy gradient on outcomes and on the token rewards of a reward model that learns from these outcomes meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError, TokenAdvantages, Tokens, log_ratios
from moalign_plugins._groups import group_mean, group_size
from moalign_plugins._outcomes import cross_entropy
from moalign_plugins.objectives._policy_gradient import PolicyGradient, Positive
from moalign_plugins.objectives._value_head import whitened

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "prime",
    "class": "PRIME",
    "summary": "outcomes and implicit process rewards, of a second adapter that learns from the outcomes in each round",
    "paper": "arXiv:2502.01456",
}

TINIEST_RETURN = 1e-6  # added to what process rewards are divided by


class ProcessModel(Objective):
    """-o log sigmoid(r) - (1 - o) log sigmoid(-r), r = beta * sum of log pi_process - log pi_ref over the response."""

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "reference"})
    shiftable: ClassVar[bool] = False

    beta: Positive = 0.05

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        count = batch.mask.sum(-1).clamp(min=1)  # every token of a response has the same
        outcome, kept = ((batch.known[name] * batch.mask).sum(-1) / count for name in ("outcome", "kept"))
        return cross_entropy(self.beta * log_ratios(batch), outcome) * kept


class PRIME(PolicyGradient):
    """The advantage of a token is the sum of two kinds of rewards still to come, each with RLOO's baseline, whitened.

    The outcome is the response's combined reward o, from 0 (wrong) to 1 (right), at its last token. The process reward
    of token t is q_t = log pi_process - log pi_ref of an adapter that is trained beside the policy's, on the same
    responses and in the same steps, with the cross-entropy of o and sigmoid(process_beta * sum of q_t). All q_t of a
    round are divided by the largest size that a sum of them up to a response's end has. The baseline of a process
    reward is made of the means over each response's tokens, that of the outcome of the others' outcomes:
        r_t - (sum over the others of their mean + own mean - r_t) / (n - 1) = n / (n - 1) (r_t - mean of the means).
    arXiv 2502.01456, formulas and numbers as in its authors' code; there the two kinds count the same, and a
    coefficient of the process reward acts only where they are one sum for another estimator. The rewards of a round are
    those of the process model before it learns from it, as in their script; in the first round they are 0.

    Of a prompt with one response nothing is learned. Their script also leaves out prompts whose mean outcome is below
    0.2 or above 0.8 (``lowest``, ``highest``), so that policy and process model learn from the others alone. The
    process model is written beside the candidate's adapter, in the folder companion. It is relative to the run's
    reference, which should be the base.
    """

    needs: ClassVar[frozenset[str]] = PolicyGradient.needs | {"token_advantages"}

    beta: float = Field(default=0.0, ge=0)
    """price of a nat of KL from the reference, in units of the combined reward"""
    epsilon_low: Annotated[float, Field(gt=0, le=1)] | None = 0.2
    """a token with a negative advantage counts no more once its probability is below 1 - epsilon_low times that at
    sampling; none: it always counts"""
    epsilon_high: Positive | None = 0.2
    """the same for positive advantages, above 1 + epsilon_high times"""
    process_beta: Positive = 0.05
    """log-odds of a right answer per nat of the process model's log-ratio, where it is trained"""
    process_lr: Positive = 2.0
    """the process model's learning rate, in units of the policy's"""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """what a reward one token later counts, of both kinds"""
    whiten: bool = True
    """whether the advantages of all tokens of a round are brought to mean 0 and deviation 1"""
    lowest: float | None = None
    """a prompt whose mean outcome is below is left out; none: no prompt is"""
    highest: float | None = None
    """a prompt whose mean outcome is above is left out; none: no prompt is"""

    def companion(self) -> Objective:
        return ProcessModel(beta=self.process_beta)

    def lr_factor(self, name: str) -> float:
        return self.process_lr

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        return {"process": batch.guides["companion"]}

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        from torch.nn.functional import pad

        if tokens.old_logps is None or tokens.ref_logps is None:
            raise PluginError('the loss reads log-ratios but does not declare "reference" and "old_logps" in `needs`')
        rows = self.kept(signal, groups)
        kept = tokens.mask * rows[:, None]
        process = (tokens.measured["process"] - tokens.ref_logps) * tokens.mask
        last = tokens.mask - pad(tokens.mask[:, 1:], (0, 1))
        own = self.shaped(signal, ((tokens.old_logps - tokens.ref_logps) * tokens.mask).sum(-1))
        advantages = (
            self.to_come(against_others(normalised(process, kept), tokens.mask, groups))
            + self.to_come(against_others(own[:, None] * last, last, groups))
        ) * kept
        figures = {"kept": float(rows.mean()), "ranked": ranked(process.sum(-1), signal, groups)}
        if self.whiten and rows.any():
            advantages = whitened(advantages, kept)
        return TokenAdvantages(advantages, {"outcome": signal[:, None] * tokens.mask, "kept": kept}, figures)

    def kept(self, signal: Tensor, groups: Tensor) -> Tensor:
        """1 where the prompt's mean outcome is within bounds, 0 elsewhere; [N]."""
        mean = group_mean(signal, groups)
        found = mean == mean
        if self.lowest is not None:
            found = found & (mean >= self.lowest)
        if self.highest is not None:
            found = found & (mean <= self.highest)
        return found.to(signal)

    def to_come(self, rewards: Tensor) -> Tensor:
        """Of each token its own reward and those behind it, each gamma times the one before; [N,T]."""
        import torch

        running, found = torch.zeros_like(rewards[:, 0]), []
        for reward in reversed(rewards.unbind(1)):
            running = reward + self.gamma * running
            found.append(running)
        return torch.stack(found[::-1], 1)


def normalised(process: Tensor, kept: Tensor) -> Tensor:
    """Divided by the largest size of what is still to come, undiscounted, over the tokens that are ``kept``; [N,T]."""
    to_come = process.flip(1).cumsum(1).flip(1) * kept
    return process / (to_come.abs().max() + TINIEST_RETURN)


def against_others(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """n / (n - 1) (r - mean over the group of each response's mean), where ``mask`` says there is a reward; [N,T].

    0 for a single response.
    """
    means = (rewards * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    size = group_size(means, groups)
    scale = (size / (size - 1).clamp(min=1)).where(size > 1, 0.0)
    return scale[:, None] * (rewards - group_mean(means, groups)[:, None]) * mask


def ranked(scores: Tensor, signal: Tensor, groups: Tensor) -> float:
    """Share of the pairs to one prompt with different outcomes whose better response has the larger score.

    Equal scores count a half, and so does a round without such a pair.
    """
    better = (groups[:, None] == groups) & (signal[:, None] > signal)
    right = (scores[:, None] > scores).to(signal) + 0.5 * (scores[:, None] == scores)
    return float((right * better).sum() / better.sum()) if better.any() else 0.5

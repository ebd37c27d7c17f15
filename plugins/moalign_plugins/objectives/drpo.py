"""Decoupled reward policy optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError
from moalign_plugins._groups import group_log_softmax, group_mean, group_size
from moalign_plugins.objectives._pairs import lengths, log_probabilities
from moalign_plugins.objectives._policy_gradient import Positive
from moalign_plugins.objectives._single_responses import advantages_of, good

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "drpo",
    "class": "DRPO",
    "summary": "likelihood of right responses, short ones first, against the likeliest of the wrong ones to a prompt",
    "paper": "arXiv:2510.04474",
}


class DRPO(Objective):
    """-(sum over right i of omega_i s_i - tau log mean over wrong j of exp(s_j / tau)), s the mean log-probability of a
    response's tokens, omega = softmax over the right ones of (1 - |y| / longest) / lam. arXiv 2510.04474.

    A response to a prompt is right if its signal is above ``threshold``. Lengths are weighed among right responses
    only: a long right one counts little, and never against itself, as it does where one mean is taken over all
    (``grpo`` with a price of length in the reward). omega maximises E[1 - |y| / longest] - lam KL(omega || uniform); as
    lam grows all right responses count the same (DisCO). A prompt whose responses are all right or all wrong teaches
    nothing, and has its place in the step's mean, as in the authors' code.

    penalty / 2 max(KL - delta, 0)^2 keeps the policy near the one that sampled, where KL is the mean of log pi_old -
    log pi over the tokens of all responses to the prompt. Its gradient is that of the authors' code, where the mean is
    over a batch. That code has a surrogate in the place of the logarithm, with the same gradient and another value; and
    its ``longest`` is the width to which it pads. Defaults are of that code, but for the threshold.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "old_logps"})
    shiftable: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    tau: Positive = 10.0
    """in nats per token: how much less likely a wrong response has to be than another to be let alone"""
    lam: Positive = 0.1
    """in parts of ``longest``: how much shorter a right response has to be to count e times as much"""
    longest: int | None = Field(default=None, ge=1)
    """tokens of a response whose shortness is 0, such as rollouts.max_new_tokens; none: of the longest to the prompt"""
    threshold: float = 0.5
    """a response is right whose signal is above this number"""
    delta: float = Field(default=1e-4, ge=0)
    """nats per token that the policy may leave the one that sampled"""
    penalty: Positive = 1000.0
    """how steeply it costs more beyond"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return (signal * 0 + 1).where(good(signal, self.threshold), -1.0)

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        counts, scores, groups = advantages_of(batch), log_probabilities(batch, average=True), batch.groups
        right = counts > 0
        kind = 2 * groups + right  # responses to one prompt that are right, or wrong, share a number
        alike, size = group_size(scores, kind), group_size(scores, groups)
        shares = group_log_softmax(self.shortness(batch) / self.lam, kind).exp()
        against = self.tau * (scores / self.tau - group_log_softmax(scores / self.tau, kind) - alike.log())
        losses = (-shares * scores).where(right, against / alike) * size * counts.abs()
        return losses.where(alike < size, 0.0) + self.departure(batch)

    def shortness(self, batch: Batch) -> Tensor:
        """1 - |y| / longest, which is below 0 for what is longer; [N]."""
        import torch

        own = lengths(batch)
        if self.longest is not None:
            return 1 - own / self.longest
        together = batch.groups[:, None] == batch.groups
        return 1 - own / torch.where(together, own, 0.0).amax(1)

    def departure(self, batch: Batch) -> Tensor:
        """The penalty for leaving the policy that sampled, the same for all responses to a prompt; [N]."""
        if batch.old_logps is None:
            raise PluginError('the loss reads old log-probabilities but does not declare "old_logps" in `needs`')
        left = ((batch.old_logps - batch.logps) * batch.mask).sum(-1)
        per_token = group_mean(left, batch.groups) / group_mean(lengths(batch), batch.groups)
        return self.penalty / 2 * (per_token - self.delta).clamp(min=0) ** 2

"""Pairwise proximal policy optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError
from moalign_plugins._groups import group_mean
from moalign_plugins.objectives._policy_gradient import Positive
from moalign_plugins.objectives._single_responses import advantages_of

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "p3o",
    "class": "P3O",
    "summary": "policy gradient from reward differences of each two responses to a prompt, with clipped ratios of both",
    "paper": "arXiv:2310.00212",
}


class P3O(Objective):
    """-w min(D h, D clip(h, -epsilon, epsilon)) / 2 for each two responses to a prompt, averaged over all its pairs.

    With R = signal - beta (log pi_old - log pi_ref) of a whole response and rho = pi / pi_old: D = R_1 - R_2; h is log
    rho_1 - log rho_2, how far the pair's log pi(y1) - log pi(y2) has gone since it was sampled; and w, held fixed, is
    what importance sampling asks for: clip(rho_1) clip(rho_2) with ``clip: separate`` (V1), clip(rho_1 rho_2) with
    ``joint`` (V2), from 1 - epsilon to 1 + epsilon. The smaller of both products is the pessimistic one: a pair that
    has gone far enough in its direction counts no more.

    arXiv 2310.00212, which has pairs; of more responses to a prompt all pairs are taken. Ratios and clips are of whole
    responses, never of tokens. The clips are unverified against the paper, whose text we could not read. Tested is that
    the expected gradient is that of E[signal] - beta KL at the policy that sampled, and that of E[signal] away from it
    where nothing is clipped; and that what a prompt adds to all its rewards changes nothing, which is not so of a
    clipped policy gradient without a baseline.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "old_logps"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"beta": frozenset({"reference"})}
    shiftable: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    detaches: ClassVar[bool] = True

    beta: float = Field(default=0.05, ge=0)
    """price of a nat of KL from the reference, in units of the combined reward"""
    clip: Literal["separate", "joint"] = "joint"
    """the ratio of each response of a pair by itself (V1), or their product (V2)"""
    epsilon: Positive | None = 0.2
    """how far from 1 a ratio counts, and from its start the pair's log-ratio; none: as far as it goes"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        rewards = signal
        if self.beta:
            if log_ratios is None:
                raise PluginError('the loss reads log-ratios but does not declare "reference" in `needs_with`')
            rewards = signal - self.beta * log_ratios
        return rewards - group_mean(rewards, groups)  # here in double precision: what is common may be large

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        if batch.old_logps is None:
            raise PluginError('the loss reads old log-probabilities but does not declare "old_logps" in `needs`')
        import torch

        rewards, gone = advantages_of(batch), ((batch.logps - batch.old_logps) * batch.mask).sum(-1)
        better, apart = (values[:, None] - values for values in (rewards, gone))
        surrogate = torch.minimum(better * apart, better * self.within(apart, 0.0))
        pairs = self.weights(gone.detach()) * surrogate / 2
        others = (batch.groups[:, None] == batch.groups) & ~torch.eye(len(gone), dtype=torch.bool, device=gone.device)
        return -pairs.where(others, 0.0).sum(1) / others.sum(1).clamp(min=1)

    def weights(self, gone: Tensor) -> Tensor:
        """Importance weights of each two responses, from the logarithms of their ratios [N]; [N,N]."""
        if self.clip == "joint":
            return self.within((gone[:, None] + gone).exp(), 1.0)
        ratios = self.within(gone.exp(), 1.0)
        return ratios[:, None] * ratios

    def within(self, values: Tensor, centre: float) -> Tensor:
        """No further from the centre than epsilon."""
        return values if self.epsilon is None else values.clamp(centre - self.epsilon, centre + self.epsilon)

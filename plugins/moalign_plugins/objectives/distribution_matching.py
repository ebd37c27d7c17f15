"""Distribution matching: descent on a divergence between the policy and the KL-optimal distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError
from moalign_plugins._groups import group_log_softmax, group_mean, group_size
from moalign_plugins.objectives._pairs import reference_tokens
from moalign_plugins.objectives._single_responses import advantages_of

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "distribution-matching",
    "class": "DistributionMatching",
    "summary": "descent on a divergence from the KL-optimal distribution, by importance sampling (GDC, f-DPG)",
    "paper": "arXiv:2205.11275, arXiv:2012.11635, arXiv:2302.08215",
}


class DistributionMatching(Objective):
    """p/q f(pi / p) of each response, with p = pi_ref exp(R / beta) / Z, R the combined reward, and q = pi_old.

    Its mean over q is the divergence, and its gradient the policy gradient with the pseudo-reward -f'(pi / p), weighed
    by pi / q. arXiv 2205.11275, 2302.08215; ``divergence`` says which:
    "forward-kl"  KL(p || pi): f' = -1 / t, which is likelihood weighed by p / q (GDC, arXiv 2012.11635)
    "reverse-kl"  KL(pi || p): f' = log t + 1, which is a policy gradient on R - beta log(pi / pi_ref), over beta
    "js"          KL(p || m) + KL(pi || m), m their mean: f' = log 2t / (1 + t); twice what is often called so
    "tv"          sum |pi - p| / 2: f' = sign(t - 1) / 2, which jumps at the target, so that it never comes to rest
    "chi2"        sum (pi - p)^2 / pi: f' = 1 - 1 / t^2

    Z of a prompt is the mean of pi_ref exp(R / beta) / q over the responses to it, so that the weights p / q have the
    mean 1 there. It is an estimate that holds the response's own weight, and the expected gradient is that of the
    divergence where responses are many, or q is p. A prompt of one response teaches nothing but to stay. ``baseline``
    takes from each pseudo-reward the mean of the others' at q, in the place of the authors' moving average, which would
    be a state. With it log Z falls out of "reverse-kl", whose gradient then is that of ``rloo`` with ``kl: reward``,
    over beta, without bias.

    Moments as constraints, E_p[r_k] >= t_k, are ``combine: {name: lagrangian, rescale: false}`` with thresholds: R =
    r_0 + sum_k m_k (r_k - t_k) is of the exponential family, and its multipliers learn from the moments of each
    round, which are those of q, not of p by importance weights. Both are the same where the policy has come to its
    target. Bounds are from below alone: for a moment that is to be met from both sides name the reward twice, with
    either ``direction``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "reference", "old_logps"})
    shiftable: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    beta: float = Field(default=0.1, gt=0)
    """price of a nat of KL from the reference, in units of the combined reward: the target's temperature"""
    divergence: Literal["forward-kl", "reverse-kl", "js", "tv", "chi2"] = "js"
    """what is between policy and target: how much too little of the target costs, or too much beside it"""
    baseline: bool = True
    """whether a response's pseudo-reward is compared with those of the others to its prompt"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return signal.clone()

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        if batch.old_logps is None:
            raise PluginError('the loss reads old log-probabilities but does not declare "old_logps" in `needs`')
        gone = ((batch.logps - batch.old_logps) * batch.mask).sum(-1)
        left = ((batch.old_logps - reference_tokens(batch)) * batch.mask).sum(-1)
        exponent = advantages_of(batch) / self.beta - left
        log_weight = group_log_softmax(exponent, batch.groups) + group_size(exponent, batch.groups).log()
        losses = TERMS[self.divergence](gone, log_weight)
        if not self.baseline:
            return losses
        slopes = SLOPES[self.divergence](-log_weight)
        return losses - gone.exp() * mean_of_others(slopes, batch.groups)


def mean_of_others(values: Tensor, groups: Tensor) -> Tensor:
    """Over the other responses to the same prompt, 0 where there are none; [N]."""
    size = group_size(values, groups)
    return (group_mean(values, groups) * size - values) / (size - 1).clamp(min=1) * (size > 1)


# --- divergences: p/q f(t) from log pi / q and log p / q, t being pi / p; and f'(t) from log t ------------------------


def _jensen_shannon(gone: Tensor, log_weight: Tensor) -> Tensor:
    from torch.nn.functional import softplus

    log_t = gone - log_weight
    return gone.exp() * (log(2) - softplus(-log_t)) + log_weight.exp() * (log(2) - softplus(log_t))


def _jensen_shannon_slope(log_t: Tensor) -> Tensor:
    from torch.nn.functional import softplus

    return log(2) - softplus(-log_t)


TERMS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward-kl": lambda gone, log_weight: log_weight.exp() * (log_weight - gone),
    "reverse-kl": lambda gone, log_weight: gone.exp() * (gone - log_weight),
    "js": _jensen_shannon,
    "tv": lambda gone, log_weight: (gone.exp() - log_weight.exp()).abs() / 2,
    "chi2": lambda gone, log_weight: (gone.exp() - log_weight.exp()) ** 2 / gone.exp(),
}
SLOPES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "forward-kl": lambda log_t: -(-log_t).exp(),
    "reverse-kl": lambda log_t: log_t + 1,
    "js": _jensen_shannon_slope,
    "tv": lambda log_t: log_t.sign() / 2,
    "chi2": lambda log_t: 1 - (-2 * log_t).exp(),
}

"""What the losses on sampled responses share: ratios and their bounds, lengths, the price of leaving the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from moalign.api import Batch, Objective, PairTerms, PluginError, log_ratios

if TYPE_CHECKING:
    from torch import Tensor

Positive = Annotated[float, Field(gt=0)]


class PolicyGradient(Objective):
    """Ascent on E[signal] - beta KL, estimated from responses that the policy sampled; subclasses make advantages.

    The loss of a response is the sum over its tokens of -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), where
    r = pi / pi_old of the token and A is the response's advantage (arXiv 1707.06347; two epsilons: arXiv 2503.14476).
    At the policy that sampled the responses r = 1 and the gradient is the plain policy gradient -A grad log pi(y).

    ``kl`` says which KL the price is for, and how it is estimated. With a the log-ratio to the reference:
    "reward"   a response counts signal - beta a(y), before any baseline or standardisation. KL(pi || reference) of
               whole responses, whose gradient is E[a grad log pi].
    "k2"       beta a(y)^2 / 2 of the response is added to its loss: the same KL, whatever is done to advantages, and at
               the policy that sampled the same expected gradient.
    "k3"       beta r (exp(-a) - 1 + a) of each token is added: KL(pi || reference) of each next token, for beginnings
               as they were sampled; arXiv 2512.02556.
    "forward"  the same without r, whose gradient is that of KL(reference || pi) of each next token; arXiv 2402.03300.
    The log-ratio itself as a loss ("k1") has the expected gradient 0 and is refused.

    ``entropy`` is a bonus: times the entropy of each next token, given the tokens before it as they were sampled, it is
    taken off the loss (arXiv 1602.01783). The gradient holds these beginnings fixed. That of the entropy of whole
    responses would also make beginnings likelier after which much is open.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "reference", "old_logps"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"entropy": frozenset({"entropy"})}
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=0.05, ge=0)
    """price of a nat of KL from the reference, in units of the combined reward"""
    kl: Literal["reward", "k2", "k3", "forward"] = "reward"
    """where the KL stands and how it is estimated: in the reward; or in the loss, as k2 or k3 of
    KL(policy || reference), or as k3 of the forward KL(reference || policy)"""
    length: Literal["none", "response"] | Positive = "none"
    """what the sum over a response's tokens is divided by: nothing, as the gradient of E[signal] has it; its own number
    of tokens; or a constant"""
    epsilon_low: Annotated[float, Field(gt=0, le=1)] | None = None
    """a token of a response worse than expected counts no more once its probability is below 1 - epsilon_low times
    that at sampling; none: it always counts"""
    epsilon_high: Positive | None = None
    """the same for better responses, above 1 + epsilon_high times"""
    entropy: float = Field(default=0.0, ge=0)
    """what a nat of entropy of each next token is worth, summed over the response's tokens and divided as they are"""

    @field_validator("kl", mode="before")
    @classmethod
    def _no_k1_in_the_loss(cls, value: Any) -> Any:
        if value == "k1":
            raise ValueError("the log-ratio (k1) as a loss has no gradient on average; use 'reward', or 'k2'")
        return value

    def shaped(self, signal: Tensor, log_ratios: Tensor | None) -> Tensor:
        """The signal less the price of the KL, where that is part of the reward; [N]."""
        if self.kl != "reward" or not self.beta:
            return signal
        if log_ratios is None:
            raise PluginError('the loss reads log-ratios but does not declare "reference" in `needs`')
        return signal - self.beta * log_ratios

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        per_token = -self.surrogate(self.log_ratio(batch), advantages_of(batch))
        if self.kl in ("k3", "forward") and self.beta:
            per_token = per_token + self.beta * self.token_kl(batch)
        if self.entropy:
            per_token = per_token - self.entropy * entropy_of(batch)
        return self.over_length((per_token * batch.mask).sum(-1) + self.response_kl(batch), batch)

    def log_ratio(self, batch: Batch) -> Tensor:
        """The logarithm of the ratio that the advantage of each token is multiplied by; [N,T]."""
        return self.log_ratio_to_old(batch)

    def surrogate(self, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        """min(r A, clip(r) A), the pessimistic one of both, with r = exp(log_ratio)."""
        import torch

        ratio = log_ratio.exp()
        lowest = 0.0 if self.epsilon_low is None else 1 - self.epsilon_low
        highest = torch.inf if self.epsilon_high is None else 1 + self.epsilon_high
        return torch.minimum(ratio * advantages, ratio.clamp(lowest, highest) * advantages)

    def token_kl(self, batch: Batch) -> Tensor:
        """The k3 estimate of each token, [N,T]; times its ratio to the sampling policy unless it is the forward KL."""
        if batch.ref_logps is None:
            raise PluginError('the loss reads reference log-probabilities but does not declare "reference" in `needs`')
        away = (batch.logps - batch.ref_logps) * batch.mask
        estimate = (-away).expm1() + away
        return estimate if self.kl == "forward" else estimate * self.log_ratio_to_old(batch).exp()

    def response_kl(self, batch: Batch) -> Tensor:
        """beta times the k2 estimate of whole responses, where ``kl`` asks for it; [N]."""
        if self.kl != "k2" or not self.beta:
            return batch.logps.new_zeros(len(batch.logps))
        return self.beta * log_ratios(batch) ** 2 / 2

    def over_length(self, totals: Tensor, batch: Batch) -> Tensor:
        """Sums over the response tokens, [N], divided as ``length`` says."""
        if self.length == "response":
            return totals / batch.mask.sum(-1).clamp(min=1)
        return totals if self.length == "none" else totals / float(self.length)

    def log_ratio_to_old(self, batch: Batch) -> Tensor:
        """log pi - log pi_old of each response token, [N,T]; 0 elsewhere."""
        if batch.old_logps is None:
            raise PluginError('the loss reads old log-probabilities but does not declare "old_logps" in `needs`')
        return (batch.logps - batch.old_logps) * batch.mask


def entropy_of(batch: Batch) -> Tensor:
    """[N,T], which the engine supplies where an option needs it."""
    if batch.entropy is None:
        raise PluginError('the loss reads entropies but does not declare "entropy" in `needs` or `needs_with`')
    return batch.entropy


def advantages_of(batch: Batch) -> Tensor:
    """[N,1], one for each response, which the engine supplies where ``needs`` has "groups"; or each token's, [N,T]."""
    if batch.token_advantages is not None:
        return batch.token_advantages
    if batch.advantages is None:
        raise PluginError('the loss reads advantages but does not declare "groups" in `needs`')
    return batch.advantages[:, None]

"""What the losses with a value head share: rewards of tokens, advantages by their values, and the values' own error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from moalign.api import Batch, PairTerms, PluginError, TokenAdvantages, Tokens
from moalign_plugins.objectives._policy_gradient import PolicyGradient, Positive

if TYPE_CHECKING:
    from torch import Generator, Tensor

TINIEST_DEVIATION = 1e-8  # added to it where advantages are whitened


class ValueHead(PolicyGradient):
    """The advantage of a token is that of generalised advantage estimation, over values that the loss learns.

    V is linear in the hidden state that predicts the token, in float32, and 0 at the start. Subclasses may reward
    tokens with more than the signal and the price of the KL (``token_rewards``).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "reference", "old_logps", "token_advantages", "hidden"})

    epsilon_low: Annotated[float, Field(gt=0, le=1)] | None = 0.2
    """a token with a negative advantage counts no more once its probability is below 1 - epsilon_low times that at
    sampling; none: it always counts"""
    epsilon_high: Positive | None = 0.2
    """the same for positive advantages, above 1 + epsilon_high times"""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """what a reward one token later counts"""
    lam: float = Field(default=0.95, ge=0, le=1)
    """1: advantages are rewards to come less the value; 0: only the next value is looked at; between: noise against
    the values' error"""
    value_epsilon: Positive | None = 0.2
    """a value further than this from that at sampling cannot lower its error any more; none: it always can"""
    value_weight: Positive = 0.1
    """of the value's squared error; it matters only where that trains the adapter, or gradients are clipped"""
    value_lr: Positive = 10.0
    """the value head's learning rate, in units of the adapter's: the head has far less to learn from a step"""
    value_trains_adapter: bool = False
    """whether the value's error has a gradient in the adapter too"""
    whiten: bool = False
    """whether the advantages of all tokens of a round are brought to mean 0 and deviation 1"""
    missing_end: float | None = None
    """what a response that was cut before its end counts, in place of its combined reward; none: what it was given"""

    def parameters(self, width: int, generator: Generator) -> Mapping[str, Tensor]:
        import torch

        return {"value.weight": torch.zeros(width), "value.bias": torch.zeros(1)}

    def lr_factor(self, name: str) -> float:
        return self.value_lr

    def measure(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"values": self.values(batch)}

    def values(self, batch: Batch) -> Tensor:
        """What is still to come, before each response token; [N,T], 0 elsewhere."""
        if batch.hidden is None:
            raise PluginError('the loss reads hidden states but does not declare "hidden" in `needs`')
        hidden = batch.hidden if self.value_trains_adapter else batch.hidden.detach()
        return (hidden @ batch.parameters["value.weight"] + batch.parameters["value.bias"]) * batch.mask

    def kl_price(self) -> float:
        """Nothing, where beta is in units of a whitened advantage."""
        return 0.0 if self.whiten and self.kl != "reward" else super().kl_price()

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        rewards, values = self.token_rewards(signal, tokens), tokens.measured["values"]
        advantages = generalised_advantages(rewards, values, tokens.mask, self.gamma, self.lam)
        known = {"returns": advantages + values}
        to_come = generalised_advantages(rewards, values * 0, tokens.mask, self.gamma, 1.0)
        figures = explained(values, to_come, tokens.mask)
        if self.whiten:
            advantages = whitened(advantages, tokens.mask)
        return TokenAdvantages(advantages, known, figures)

    def token_rewards(self, signal: Tensor, tokens: Tokens) -> Tensor:
        """The signal at the last token, and the price of the KL at each, where it is part of the reward; [N,T]."""
        from torch.nn.functional import pad

        if self.missing_end is not None:
            signal = signal.where(tokens.ended, self.missing_end)
        last = tokens.mask - pad(tokens.mask[:, 1:], (0, 1))
        rewards = signal[:, None] * last
        if self.kl != "reward":
            return rewards
        if tokens.old_logps is None or tokens.ref_logps is None:
            raise PluginError('the loss reads log-ratios but does not declare "reference" and "old_logps" in `needs`')
        return rewards - self.beta * (tokens.old_logps - tokens.ref_logps)

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        error = self.value_weight / 2 * self.value_error(batch) * batch.mask
        return super().loss(batch, terms) + self.over_length(error.sum(-1), batch)

    def value_error(self, batch: Batch) -> Tensor:
        """Squared, the larger one of that of the value and of the value held near the one at sampling; [N,T]."""
        import torch

        values, old, returns = self.values(batch), batch.known["values"], batch.known["returns"]
        error = (values - returns) ** 2
        if self.value_epsilon is None:
            return error
        near = old + (values - old).clamp(-self.value_epsilon, self.value_epsilon)
        return torch.maximum(error, (near - returns) ** 2)


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t; 0 behind a response's end; [N,T]."""
    import torch
    from torch.nn.functional import pad

    values = values * mask
    deltas = (rewards + gamma * pad(values[:, 1:], (0, 1)) - values) * mask
    running, found = torch.zeros_like(deltas[:, 0]), []
    for delta in reversed(deltas.unbind(1)):
        running = delta + gamma * lam * running
        found.append(running)
    return torch.stack(found[::-1], 1)


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and deviation 1 (divisor n - 1) over all tokens of the round, 0 elsewhere; [N,T]."""
    count = mask.sum()
    centred = (advantages - (advantages * mask).sum() / count) * mask
    return centred / (((centred**2).sum() / (count - 1).clamp(min=1)).sqrt() + TINIEST_DEVIATION)


def explained(values: Tensor, to_come: Tensor, mask: Tensor) -> dict[str, float]:
    """The mean value, and the share of the variance of the rewards to come that the values explain; 1: all of it."""
    tokens = mask > 0
    targets, error = to_come[tokens], (to_come - values)[tokens]
    spread = float(targets.var(correction=0))
    share = 1 - float(error.var(correction=0)) / spread if spread else 0.0
    return {"value": float(values[tokens].mean()), "explained_variance": share}

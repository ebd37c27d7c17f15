"""Likelihood weighted by the exponential of the advantage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError
from moalign_plugins._groups import group_mean
from moalign_plugins.objectives._pairs import lengths, log_probabilities
from moalign_plugins.objectives._single_responses import advantages_of

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "advantage-weighted",
    "class": "AdvantageWeighted",
    "summary": "likelihood of each response times exp((reward - value) / beta): advantage-weighted regression",
    "paper": "arXiv:2302.08582, arXiv:1910.00177",
}


class AdvantageWeighted(Objective):
    """-min(exp((R(y) - V) / beta), 1000) log pi(y) of each response, with R the combined reward. arXiv 2302.08582.

    V is the mean of R over the responses to the prompt. So prompts whose responses are all good count no more than
    others; a prompt with one response has the weight 1, whatever its reward. As beta grows it becomes likelihood.

    ``learned: true`` is the paper's, for prompts with one response: a linear value head reads each token's hidden
    state, without a gradient in the adapter, and V is its guess of R there, so that each token has its own weight; the
    loss is ``policy`` times the weighted likelihood plus 1 - ``policy`` times the mean squared error of the guesses.
    The weight has no gradient in the head. As the head begins at 0 the first weights are exp(R / beta).

    A combiner's multiplier, which is that of advantages, then multiplies R. Weights above 1000 count 1000, as in the
    paper's code. beta has the reward's units; the paper's was 10 or 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"learned": frozenset({"hidden"})}
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=1.0, gt=0)
    """in units of the combined reward: by how much better a response has to be to count e times as much"""
    largest: float = Field(default=1000.0, gt=0)
    """weights above it count as much as this"""
    average: bool = True
    """mean over the response's tokens; false: their sum"""
    learned: bool = False
    """whether the value is learned, and not the mean over the responses to the prompt"""
    policy: float = Field(default=0.5, gt=0, lt=1)
    """share of the likelihood in the loss beside the error of a learned value"""
    value_lr: float = Field(default=10.0, gt=0)
    """the value head's learning rate, in units of the adapter's"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        if self.learned:
            return signal.clone()
        return self.weights(signal - group_mean(signal, groups))

    def weights(self, advantages: Tensor) -> Tensor:
        """min(exp(advantages / beta), largest)."""
        from math import log

        return (advantages / self.beta).clamp(max=log(self.largest)).exp()

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        counts = advantages_of(batch)
        if not self.learned:
            return -counts * log_probabilities(batch, average=self.average)
        values = self.values(batch)
        weights = self.weights(counts[:, None] - values.detach())
        likelihood, error = (weights * batch.logps * batch.mask).sum(-1), ((counts[:, None] - values) ** 2 * batch.mask)
        number = lengths(batch)
        if self.average:
            likelihood = likelihood / number
        return -self.policy * likelihood + (1 - self.policy) * error.sum(-1) / number

    def values(self, batch: Batch) -> Tensor:
        """What the head takes the response's reward to be, before each token; [N,T]."""
        if batch.hidden is None:
            raise PluginError('the loss reads hidden states but does not declare "hidden" in `needs`')
        own = batch.parameters
        return batch.hidden.detach() @ own["value.weight"] + own["value.bias"]

    def parameters(self, width: int, generator: Generator) -> Mapping[str, Tensor]:
        import torch

        return {"value.weight": torch.zeros(width), "value.bias": torch.zeros(1)} if self.learned else {}

    def lr_factor(self, name: str) -> float:
        return self.value_lr

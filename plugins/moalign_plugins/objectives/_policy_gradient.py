"""What the losses on sampled responses share: the length they divide by, and the price of moving from the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError

if TYPE_CHECKING:
    from torch import Tensor


class PolicyGradient(Objective):
    """Ascent on E[signal] - beta KL(policy || reference), estimated from responses that the policy sampled.

    The KL is part of the signal: a response whose log-ratio to the reference is a counts as signal - beta a. Its
    gradient is that of the reverse KL, E[a grad log pi], with the baseline of the rewards (catalogue X1).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "reference", "old_logps"})
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=0.05, ge=0)
    """price of a nat of KL from the reference, in units of the combined reward"""
    length: Literal["none", "response"] | float = "none"
    """what the sum over a response's tokens is divided by: nothing, as the gradient of E[signal] has it; its own number
    of tokens; or a constant"""

    def shaped(self, signal: Tensor, log_ratios: Tensor | None) -> Tensor:
        """The signal less the price of the KL; [N]."""
        if log_ratios is None:
            raise PluginError('the loss reads log-ratios but does not declare "reference" in `needs`')
        return signal - self.beta * log_ratios

    def over_length(self, per_token: Tensor, batch: Batch) -> Tensor:
        """[N,T] -> [N]: the sum over the response tokens, divided as ``length`` says."""
        totals = (per_token * batch.mask).sum(-1)
        if self.length == "response":
            return totals / batch.mask.sum(-1).clamp(min=1)
        return totals if self.length == "none" else totals / float(self.length)

    def log_ratio_to_old(self, batch: Batch) -> Tensor:
        """log pi - log pi_old of each response token, [N,T]; 0 elsewhere."""
        if batch.old_logps is None:
            raise PluginError('the loss reads old log-probabilities but does not declare "old_logps" in `needs`')
        return (batch.logps - batch.old_logps) * batch.mask

    def weighted(self, batch: Batch) -> Tensor:
        """-advantage * ratio * log-probability summed: what all losses without clipping are; [N].

        The gradient is that of the importance-weighted objective token by token, and at the policy that sampled the
        responses the plain policy gradient.
        """
        assert batch.advantages is not None
        ratios = self.log_ratio_to_old(batch).exp()
        return -self.over_length(ratios, batch) * batch.advantages

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return self.weighted(batch)


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """The mean over the responses to the same prompt, for each of them; [N] -> [N]."""
    index, counts = _numbered(groups)
    totals = values.new_zeros(len(counts)).index_add(0, index, values)
    return (totals / counts)[index]


def group_size(values: Tensor, groups: Tensor) -> Tensor:
    """How many responses there are to the same prompt, for each of them; [N] -> [N]."""
    index, counts = _numbered(groups)
    return counts.to(values)[index]


def group_deviation(values: Tensor, groups: Tensor) -> Tensor:
    """The standard deviation within the group, with the divisor G - 1 and 0 for a group of one; [N] -> [N]."""
    centred = values - group_mean(values, groups)
    size = group_size(values, groups)
    return (group_mean(centred**2, groups) * size / (size - 1).clamp(min=1)).sqrt()


def _numbered(groups: Tensor) -> tuple[Tensor, Tensor]:
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    return index, counts

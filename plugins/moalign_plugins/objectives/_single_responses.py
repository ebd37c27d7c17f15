"""What losses share that take responses one by one: which are good, how likely each is, and what it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from moalign.api import Batch, PluginError

if TYPE_CHECKING:
    from torch import Tensor

Threshold = float | Literal["mean"]


def good(signal: Tensor, threshold: Threshold) -> Tensor:
    """Which responses of a round have a signal above the threshold, or above the mean of the round; bool [N]."""
    return signal > (signal.mean() if threshold == "mean" else threshold)


def response_logps(batch: Batch, *, mean: bool) -> Tensor:
    """log pi of each response, summed or (``mean``) averaged over its tokens; [N]."""
    totals = (batch.logps * batch.mask).sum(-1)
    return totals / tokens_of(batch) if mean else totals


def tokens_of(batch: Batch) -> Tensor:
    """How many tokens each response has, at least 1; [N]."""
    return batch.mask.sum(-1).clamp(min=1)


def advantages_of(batch: Batch) -> Tensor:
    """What each response counts; [N]."""
    if batch.advantages is None:
        raise PluginError('the loss reads advantages but does not declare "groups" in `needs`')
    return batch.advantages

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


def shares_of_best(signal: Tensor, groups: Tensor, keep: int) -> Tensor:
    """G / keep for the ``keep`` best of the G responses to a prompt, else 0; of equals the earlier is kept; [N]."""
    shares = signal.new_zeros(len(signal))
    for group in groups.unique():
        rows = (groups == group).nonzero().squeeze(1)
        best = signal[rows].argsort(descending=True, stable=True)[:keep]
        shares[rows[best]] = len(rows) / len(best)
    return shares


def advantages_of(batch: Batch) -> Tensor:
    """What each response counts; [N]."""
    if batch.advantages is None:
        raise PluginError('the loss reads advantages but does not declare "groups" in `needs`')
    return batch.advantages

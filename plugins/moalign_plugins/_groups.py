"""Statistics over the responses to the same prompt, which losses and combiners on sampled responses share.

``groups`` [N]: responses to one prompt share a number. Values are [N], or [N,K] for K columns apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """The mean within the group, for each response; shaped as the values."""
    index, counts = _numbered(groups)
    totals = values.new_zeros(len(counts), *values.shape[1:]).index_add(0, index, values)
    return (totals / _beside(counts, values))[index]


def group_size(values: Tensor, groups: Tensor) -> Tensor:
    """How many responses there are in the group, for each of them; [N], or [N,1] beside columns."""
    index, counts = _numbered(groups)
    return _beside(counts.to(values)[index], values)


def group_deviation(values: Tensor, groups: Tensor) -> Tensor:
    """The standard deviation within the group, shaped as the values: divisor G - 1, and 0 for a group of one."""
    centred = values - group_mean(values, groups)
    size = group_size(values, groups)
    return (group_mean(centred**2, groups) * size / (size - 1).clamp(min=1)).sqrt()


def leave_one_out(values: Tensor, groups: Tensor) -> Tensor:
    """Each value less the mean of the others in its group, [N]; 0 for a group of one."""
    size = group_size(values, groups)
    return size / (size - 1).clamp(min=1) * (values - group_mean(values, groups))


def group_log_softmax(values: Tensor, groups: Tensor) -> Tensor:
    """values - log of the sum of exp(values) within the group, for each response [N]."""
    index, counts = _numbered(groups)
    largest = values.new_full((len(counts),), -float("inf")).scatter_reduce(0, index, values.detach(), "amax")
    centred = values - largest[index]
    totals = values.new_zeros(len(counts)).index_add(0, index, centred.exp())
    return centred - totals.log()[index]


def _numbered(groups: Tensor) -> tuple[Tensor, Tensor]:
    _, index, counts = groups.unique(return_inverse=True, return_counts=True)
    return index, counts


def _beside(numbers: Tensor, values: Tensor) -> Tensor:
    """One number for each row of the values, to be broadcast over their columns."""
    return numbers.view(-1, *[1] * (values.ndim - 1))

"""What distillation from frozen teachers shares: divergences over the whole vocabulary, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.api import Batch, PluginError

if TYPE_CHECKING:
    from torch import Tensor


def distribution(batch: Batch, name: str) -> Tensor:
    """Log-probabilities of the vocabulary at each response token; [S,V]. Raises PluginError where it is missing."""
    if name not in batch.distributions:
        raise PluginError(f"the loss reads the distribution of '{name}' but does not declare \"distributions\"")
    return batch.distributions[name]


def divergence(policy: Tensor, teacher: Tensor) -> Tensor:
    """KL(policy || teacher) of each token, both log-probabilities; [S,V] -> [S]."""
    return (policy.exp() * (policy - teacher)).sum(-1)


def over_pairs(batch: Batch, values: Tensor) -> Tensor:
    """Mean over the tokens of each response, then over both responses of each pair; [S] -> [P]."""
    rows = batch.mask.nonzero()[:, 0]
    totals = values.new_zeros(len(batch.mask)).index_add(0, rows, values)
    means = totals / batch.mask.sum(-1).clamp(min=1)
    return (means[batch.pairs[:, 0]] + means[batch.pairs[:, 1]]) / 2

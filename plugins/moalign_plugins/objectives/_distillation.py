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


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of each token, both log-probabilities; [S,V] -> [S]."""
    return (first.exp() * (first - second)).sum(-1)


def at_tokens(batch: Batch, values: Tensor) -> Tensor:
    """Numbers of the response tokens at their places, 0 elsewhere; [S] -> [N,T]."""
    import torch

    return torch.zeros_like(batch.mask, dtype=values.dtype).masked_scatter(batch.mask > 0, values)


def over_responses(batch: Batch, values: Tensor) -> Tensor:
    """Mean over the tokens of each response; [S] -> [N]."""
    rows = batch.mask.nonzero()[:, 0]
    totals = values.new_zeros(len(batch.mask)).index_add(0, rows, values)
    return totals / batch.mask.sum(-1).clamp(min=1)


def over_pairs(batch: Batch, values: Tensor) -> Tensor:
    """Mean over the tokens of each response, then over both responses of each pair; [S] -> [P]."""
    means = over_responses(batch, values)
    return (means[batch.pairs[:, 0]] + means[batch.pairs[:, 1]]) / 2

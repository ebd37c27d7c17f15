"""What forms with heads on hidden states share: their first weights, what they read, and the scores of a pair's two
responses under the objective that judged it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from moalign.api import Batch, PluginError

if TYPE_CHECKING:
    from torch import Generator, Tensor

Positive = Annotated[float, Field(gt=0)]


def first_weights(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Normal draws of mean 0 and variance 1 / (width + 1), where the last axis is the width. arXiv 2009.01325."""
    import torch

    return torch.randn(shape, generator=generator) / (shape[-1] + 1) ** 0.5


def final_states(batch: Batch, like: Tensor) -> Tensor:
    """``batch.final`` [N,D] in the number format of the head ``like``. Raises PluginError where it is not supplied."""
    if batch.final is None:
        raise PluginError('the reward model reads final states but does not declare "final" in `needs`')
    return batch.final.to(like.dtype)


def linear_scores(batch: Batch, name: str = "head.weight") -> Tensor:
    """[N,M]: final states times the transposed weights [M,D] of that name."""
    weights = batch.parameters[name]
    return final_states(batch, weights) @ weights.T


def of_pairs(scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """From [N,M] the scores of chosen and rejected, each [P], under the objective that judged the pair."""
    judged = batch.pair_objective[:, None]
    chosen, rejected = (scores[batch.pairs[:, side]].gather(1, judged).squeeze(1) for side in (0, 1))
    return chosen, rejected

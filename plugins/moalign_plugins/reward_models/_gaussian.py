"""Several Gaussian heads per objective on one trunk, as the forms that learn them from scores and from pairs share
them. arXiv 2409.15360."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from moalign.api import Batch, RewardModel
from moalign_plugins.reward_models._heads import Positive, final_states, first_weights

if TYPE_CHECKING:
    from torch import Generator, Tensor


class GaussianHeads(RewardModel):
    """Head i says N(mu_i, sd_i^2) with mu_i linear in the final state, sd_i = exp(linear + bias) + least_deviation.

    The score is alpha mu_j + (1 - alpha) min over i of mu_i, where j is the head with the smallest sd_j, all of one
    response and objective. The minimum of each response is at most what the paper takes, the smallest over the heads
    of the expected score.
    """

    heads: int = Field(default=5, ge=1)
    """they start from different draws and learn from the same data"""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """1: the score of the surest head alone; 0: the smallest of all heads"""
    least_deviation: float = Field(default=1e-3, ge=0)
    """added to each standard deviation, in units of the score: without it the loss of an exact fit has no bound"""
    head_lr: Positive = 1.0
    """the heads' learning rate, in units of the adapter's"""

    def parameters(self, width: int, objectives: tuple[str, ...], generator: Generator) -> Mapping[str, Tensor]:
        import torch

        shape = (self.heads, len(objectives), width)
        return {
            "mean.weight": first_weights(shape, generator),
            "log_deviation.weight": torch.zeros(shape),
            "log_deviation.bias": torch.zeros(shape[:2]),
        }

    def lr_factor(self, name: str) -> float:
        return self.head_lr

    def gaussians(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Means and standard deviations, each [h,N,M]."""
        final = final_states(batch, batch.parameters["mean.weight"])
        means = final @ batch.parameters["mean.weight"].mT
        logs = final @ batch.parameters["log_deviation.weight"].mT + batch.parameters["log_deviation.bias"][:, None]
        return means, logs.exp() + self.least_deviation

    def scores(self, batch: Batch) -> Tensor:
        means, deviations = self.gaussians(batch)
        nominal = means.gather(0, deviations.argmin(0, keepdim=True)).squeeze(0)
        return self.alpha * nominal + (1 - self.alpha) * means.amin(0)

    def head(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        return parameters["mean.weight"][0] if self.heads == 1 else None

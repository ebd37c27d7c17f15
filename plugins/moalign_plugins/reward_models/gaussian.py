"""Several heads with a mean and a standard deviation, learned from scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch
from moalign_plugins.reward_models._gaussian import GaussianHeads
from moalign_plugins.reward_models._labels import FromScores, mean_of_known

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "gaussian",
    "class": "Gaussian",
    "summary": "several heads with mean and standard deviation, Gaussian likelihood of the scores that are known",
    "paper": "arXiv:2409.15360",
}


class Gaussian(GaussianHeads, FromScores):
    """((y - mu_i) / sd_i)^2 / 2 + log sd_i + log(2 pi) / 2, the mean over heads i and over the scores that are known.

    y = scale s + shift of a score s. Head i says N(mu_i, sd_i^2), with mu_i linear in the final state and without
    bias. The model's own score is alpha mu_j + (1 - alpha) min over i of mu_i, where j is the head with the smallest
    sd_j, all of one response and objective; arXiv 2409.15360 takes the minimum over heads of the expected score, which
    is not smaller than the expectation of this.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"final", "rewards"})

    def parameters(self, width: int, objectives: tuple[str, ...], generator: Generator) -> Mapping[str, Tensor]:
        self.check_names(objectives)
        return super().parameters(width, objectives, generator)

    def loss(self, batch: Batch) -> Tensor:
        targets, known = self.targets(batch)
        means, deviations = self.gaussians(batch)
        surprise = ((targets - means) / deviations) ** 2 / 2 + deviations.log() + math.log(2 * math.pi) / 2
        return mean_of_known(surprise.mean(0), known)

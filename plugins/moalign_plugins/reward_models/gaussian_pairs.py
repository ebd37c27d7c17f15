"""Several heads with a mean and a standard deviation, learned from pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch
from moalign_plugins.reward_models._gaussian import GaussianHeads
from moalign_plugins.reward_models._heads import of_pairs

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "gaussian-pairs",
    "class": "GaussianPairs",
    "summary": "several heads with mean and standard deviation, the probability that chosen is above rejected",
    "paper": "arXiv:2409.15360",
}


class GaussianPairs(GaussianHeads):
    """-log Phi((mu_i(chosen) - mu_i(rejected)) / sqrt(sd_i(chosen)^2 + sd_i(rejected)^2)), the mean over heads i.

    Phi is the normal distribution function; head i says N(mu_i, sd_i^2) of a response, with mu_i linear in the final
    state. The model's own score is alpha mu_j + (1 - alpha) min over i of mu_i, where j is the head with the smallest
    sd_j. Pairs say nothing of the unit and the zero of a head, which its smallest sd and a minimum over heads compare:
    ``centre`` brings the heads to one zero, and they start with one unit.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"final", "pairs"})

    centre: float = Field(default=0.01, ge=0)
    """weight of (mu_i(chosen) + mu_i(rejected))^2, which keeps the scores of each head near 0; 0: none"""

    def loss(self, batch: Batch) -> Tensor:
        import torch

        means, deviations = self.gaussians(batch)
        found = []
        for mean, deviation in zip(means, deviations, strict=True):
            chosen, rejected = of_pairs(mean, batch)
            one, other = of_pairs(deviation, batch)
            likelihood = torch.special.log_ndtr((chosen - rejected) / (one**2 + other**2).sqrt())
            found.append(self.centre * (chosen + rejected) ** 2 - likelihood)
        return torch.stack(found).mean(0)

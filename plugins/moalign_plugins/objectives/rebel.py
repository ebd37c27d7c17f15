"""Regression of log-ratio differences on reward differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, pair_logits
from moalign_plugins.objectives._pairs import reward_differences

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "rebel",
    "class": "REBEL",
    "summary": "regression of reward differences on log-ratio differences; minimised by the KL-optimal policy",
    "paper": "arXiv:2404.16767, arXiv:2402.08714",
}


class REBEL(Objective):
    """(difference - z)^2 with z = scale * beta * d - margin, and the scalarised reward difference of the two responses.

    d is the log-ratio of the first minus that of the second response; which of them is better does not matter.
    At the minimiser, reference * exp(reward / beta), every residual is zero. arXiv 2404.16767 (REBEL) with the
    fixed reference in place of the previous policy, which is also arXiv 2402.08714 (PRDP) without its clipping.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"margins", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference, in units of the reward"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return (reward_differences("rebel", terms) - pair_logits(batch, terms, self.beta)) ** 2

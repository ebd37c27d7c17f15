"""Preference optimisation by the squared hinge loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, Objective, PairTerms, pair_logits
from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor


class SquaredHinge(Objective):
    """max(0, 1 - z)^2 with z = scale * beta * d - margin, d the difference of the two log-ratios. arXiv:2402.05749.

    A pair whose logit is 1 or more has no gradient; below, the loss is that of a regression of z on 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return (1 - pair_logits(batch, terms, self.beta)).relu() ** 2

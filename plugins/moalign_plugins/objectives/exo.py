"""Efficient exact optimisation of pairs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, pair_logits

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "exo",
    "class": "EXO",
    "summary": "reverse KL of a pair's policy probabilities to its smoothed label",
    "paper": "arXiv:2402.00856",
}


class EXO(Objective):
    """KL(p || q) of p = (sigmoid(z), sigmoid(-z)) and q = (1 - e, e), with z = scale * beta * d - margin.

    e is ``label_smoothing``, d the log-ratio to the reference, summed over tokens, of the chosen minus that of the
    rejected response. arXiv 2402.00856, eq. 16, for pairs, "exo_pair" in TRL: the KL that DPO takes the other way
    round. It is 0 where z = log((1 - e) / e), and has no slope for pairs far on either side.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""
    label_smoothing: float = Field(default=1e-3, gt=0, lt=0.5)
    """share of the labels that is taken to be wrong; 0 would be an infinite KL"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        from torch.nn.functional import logsigmoid

        logits = pair_logits(batch, terms, self.beta)
        right = logits.sigmoid() * (logsigmoid(logits) - math.log1p(-self.label_smoothing))
        return right + (-logits).sigmoid() * (logsigmoid(-logits) - math.log(self.label_smoothing))

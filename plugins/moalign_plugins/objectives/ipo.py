"""Identity preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, log_ratios
from moalign_plugins.objectives._pairs import average_log_ratios, difference

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "ipo",
    "class": "IPO",
    "summary": "squared loss that pulls the log-ratio difference of a pair to 1/(2 beta)",
    "paper": "arXiv:2310.12036",
}


class IPO(Objective):
    """(scale * d - margin / beta - 1 / (2 beta))^2, the paper's (d - 1 / (2 beta))^2 at scale 1 and margin 0.

    d is the log-ratio to the reference of the chosen minus that of the rejected response. arXiv 2310.12036, eq. 17;
    beta is its tau. In terms of z = scale * beta * d - margin, which every pairwise loss sees, this is
    ((z - 1/2) / beta)^2 with the expected z = P(chosen preferred) - 1/2: where DPO reads a label as
    a reward difference on the logit scale, IPO reads it on the scale of probabilities. So MODPO composes with it:
    where P_k = 1/2 + r_k(a) - r_k(b), the minimiser is reference * exp(w.r / beta), for every labelling objective k.

    ``average`` divides each log-ratio by its number of tokens. The paper writes the sum, which is the default: only
    with sums does the minimiser have the closed form above. TRL averages, after asking the authors, whose experiments
    did; beta and the combiner's margins are then per token.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """strength of the pull to the reference; the target of d is 1 / (2 beta)"""
    average: bool = False
    """log-ratios averaged over tokens instead of summed"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        ratios = average_log_ratios(batch) if self.average else log_ratios(batch)
        return (terms.scale * difference(batch, ratios) - (terms.margin + 0.5) / self.beta) ** 2

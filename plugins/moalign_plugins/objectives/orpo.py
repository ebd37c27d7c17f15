"""Odds ratio preference optimisation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, chosen_logps
from moalign_plugins.objectives._pairs import difference, log_probabilities, logistic, shifted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "orpo",
    "class": "ORPO",
    "summary": "likelihood of the chosen response, and the odds ratio of the pair; no reference",
    "paper": "arXiv:2403.07691",
}

SURE = 1e-6  # below which 1 - p is lost in float32


class ORPO(Objective):
    """-m(yw) - lam log sigmoid(z), z = scale * [o(yw) - o(yl)] - margin, with m(y) the log-probability per token.

    o = m - log(1 - exp(m)) are the log-odds of exp(m), the geometric mean of the tokens' probabilities. arXiv
    2403.07691, eqs. 6 and 7; lam 0.1 is the paper's and TRL's ``beta``. No reference is computed. TRL's likelihood
    term is a mean over the tokens of prompts and responses of a batch, the one here over those of one response. A
    combiner's scale and margin act on z alone, its weight on the whole loss.

    Where m is above -1e-6 the odds are infinite to float32, and so is their slope: there 1e-6 stands in its place,
    and the odds have no gradient, but for the likelihood term.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    lam: float = Field(default=0.1, ge=0)
    """weight of the odds ratio beside the likelihood of the chosen response"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        means = log_probabilities(batch, average=True)
        odds = shifted(terms, 1.0, difference(batch, log_odds(means)))
        return self.lam * logistic(odds) - chosen_logps(batch, mean=True)


def log_odds(logps: Tensor) -> Tensor:
    """log p / (1 - p) of log p, by log(-expm1) near 0 and log1p(-exp) away from it, which keep all digits."""
    import torch

    logps = logps.clamp(max=-SURE)
    near = logps > -math.log(2)
    # each branch sees only what it is for: the gradient of the other would be infinite times 0
    by_expm1 = torch.log(-torch.where(near, logps, -1.0).expm1())
    by_log1p = torch.log1p(-torch.where(near, -1.0, logps).exp())
    return logps - torch.where(near, by_expm1, by_log1p)

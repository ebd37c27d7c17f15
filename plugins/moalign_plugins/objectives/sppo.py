"""Self-play preference optimisation with hard labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, log_ratios
from moalign_plugins.objectives._pairs import of_pairs, refuse_terms

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "sppo",
    "class": "SPPO",
    "summary": "regression of each log-ratio on half a win or half a loss",
    "paper": "arXiv:2405.00675",
}


class SPPO(Objective):
    """(a(yw) - 1 / (2 beta))^2 + (a(yl) + 1 / (2 beta))^2, with a the log-ratio to the reference, summed over tokens.

    arXiv 2405.00675, eq. 4.7, with probability 1 that the chosen response wins and 0 that the rejected one does,
    "sppo_hard" in TRL; beta is 1 / eta. The paper's reference is the previous iterate, and its probabilities come from
    a model of preferences. beta 0.001 is that of eta 1000, from memory of the paper.

    Each response has a term of its own, and there is no pairwise logit that a combiner could scale or shift: terms with
    a scale other than 1 or a margin other than 0 are refused.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=0.001, gt=0)
    """strength of the pull to the reference; the targets of the log-ratios are 1 / (2 beta) and its negative"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        refuse_terms("sppo", terms)
        chosen, rejected = of_pairs(batch, log_ratios(batch))
        return (chosen - 0.5 / self.beta) ** 2 + (rejected + 0.5 / self.beta) ** 2

"""Direct Nash optimisation: soft labels from reward differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, pair_logits
from moalign_plugins.objectives._pairs import logistic, reward_differences

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "dno",
    "class": "DNO",
    "summary": "logistic loss with soft labels from reward differences; minimised by the KL-optimal policy",
    "paper": "arXiv:2404.03715",
}


class DNO(Objective):
    """-q log sigmoid(z) - (1 - q) log sigmoid(-z), with z = scale * beta * d - margin and q = sigmoid(r(y1) - r(y2)).

    d is the log-ratio to the reference of the first minus that of the second response; which is better does not
    matter. The minimiser over all pairs is reference * exp(r / beta) / Z, as that of ``rebel``, but the slope in d is
    never above beta. arXiv 2404.03715, from memory of the paper: there beta is eta, the reference is the previous
    iterate, which also sampled the responses, and r(y) is the probability that y is preferred to a response of that
    iterate. Here r is the combined reward, and with a fixed reference it is one iteration. The paper's practical form,
    the label alone on pairs with a large difference, is ``dpo`` with the same reference.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"margins", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference, in units of the reward"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        second_better = (-reward_differences("dno", terms)).sigmoid()
        return logistic(pair_logits(batch, terms, self.beta), second_better)

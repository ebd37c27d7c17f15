"""Exploratory preference optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, pair_logits
from moalign_plugins.objectives._optimism import of_reference_responses
from moalign_plugins.objectives._pairs import log_probabilities, logistic

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "xpo",
    "class": "XPO",
    "summary": "DPO with a bonus for exploration: the reference's own responses become less likely",
    "paper": "arXiv:2405.21046",
}


class XPO(Objective):
    """-log sigmoid(z) + alpha * log pi(y0|x), with z = scale * beta * d - margin.

    d is the log-ratio to the reference, summed over tokens, of the chosen minus that of the rejected response; y0 is a
    response of the reference to the pair's prompt. arXiv 2405.21046, whose algorithm samples new pairs in each
    iteration, one response from the policy and one, y0, from the base. With rollouts both of a pair are the policy's
    here, and y0 a response of the reference, the base where the configuration names none; with pairs of the data y0
    is sampled once before training. It is ``selm`` with alpha / beta in place of alpha, but for a constant.

    Nothing bounds the second term from below, so alpha is small. 1e-5 is of TRL's implementation, from memory; the
    paper's theory has it fall with the number of pairs. A combiner's scale and margin act on z alone, its weight on the
    whole loss.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"alpha": frozenset({"reference_responses"})}

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""
    alpha: float = Field(default=1e-5, ge=0)
    """strength of the exploration; 0 is DPO, and then no response is sampled"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        losses = logistic(pair_logits(batch, terms, self.beta))
        if not self.alpha:
            return losses
        return losses + self.alpha * of_reference_responses(batch, log_probabilities(batch))

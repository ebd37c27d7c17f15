"""Self-exploring language models: DPO that moves away from what the reference says by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, log_ratios, pair_logits
from moalign_plugins.objectives._optimism import of_reference_responses
from moalign_plugins.objectives._pairs import logistic

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "selm",
    "class": "SELM",
    "summary": "DPO with optimism: the likelihood of the reference's own responses is pushed down",
    "paper": "arXiv:2405.19332",
}


class SELM(Objective):
    """-log sigmoid(z) + alpha * beta * a(y0), with z = scale * beta * d - margin and a the log-ratio to the reference.

    d = a(yw) - a(yl), all summed over tokens; y0 is a response of the reference to the pair's prompt. arXiv 2405.19332.
    The sign is plus: the reference's own response becomes less likely, which leaves room for others. Nothing bounds
    that term from below, so alpha is small; beta 0.01 and alpha 0.001 are of the authors' code for Zephyr and Phi-3
    (0.0001 for Llama-3). There the reference is the previous iterate, and pairs are new in each round:

        rollouts: {...}
        reference: previous-iterate

    y0 is then the first of the responses that this policy gave in the round, whatever its rewards are; it may be one of
    the pair. From another reference one response to each prompt is sampled in each round, and with pairs of the data
    one from the untouched base before training.

    A combiner's scale and margin act on z alone, its weight on the whole loss.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"alpha": frozenset({"reference_responses"})}

    beta: float = Field(default=0.01, gt=0)
    """strength of the KL penalty towards the reference"""
    alpha: float = Field(default=0.001, ge=0)
    """strength of the optimism; 0 is DPO, and then no response is sampled"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        losses = logistic(pair_logits(batch, terms, self.beta))
        if not self.alpha:
            return losses
        return losses + self.alpha * self.beta * of_reference_responses(batch, log_ratios(batch))

"""Supervised human feedback: likelihood of the best of many samples, with a forward KL from the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms
from moalign_plugins.objectives._distillation import distribution, divergence, over_responses
from moalign_plugins.objectives._pairs import log_probabilities
from moalign_plugins.objectives._single_responses import advantages_of, shares_of_best

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "superhf",
    "class": "SuperHF",
    "summary": "likelihood of the best of the responses to each prompt, and a forward KL from the reference on them",
    "paper": "arXiv:2310.16763",
}


class SuperHF(Objective):
    """-log pi(y) + beta KL(reference || pi) of the best of the G responses to a prompt, and nothing of the others.

    Both are means over the response's tokens; the KL of each next token is over the whole vocabulary. arXiv 2310.16763.
    A superbatch there is what ``rollouts.samples`` is here, 16 or 32; of equal signals the earlier response is kept.
    The step's mean is over all responses, so that a kept one counts G times. With ``beta: 0`` it is
    ``rejection-sampling``. Without rollouts the responses are those of the data.

    The authors' code takes the KL at labels that it has not shifted by one, and leaves out what is below 0; here the
    labels are shifted, and the KL cannot be. Its optional price of the loss's inverse is left out, and the default beta
    is ours. Memory: policy and reference take 4 bytes each for S tokens of a pass times V, and the gradient as much
    again; a smaller train.tokens_per_pass needs less.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"beta": frozenset({"reference", "distributions"})}
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=0.1, ge=0)
    """price of a nat of KL(reference || policy) per token, in nats of likelihood"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return shares_of_best(signal, groups, keep=1)

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        losses = -log_probabilities(batch, average=True)
        if self.beta:
            kl = divergence(distribution(batch, "reference"), distribution(batch, "policy"))
            losses = losses + self.beta * over_responses(batch, kl)
        return advantages_of(batch) * losses

"""Self-improvement by sharpening: the model's own likelihood as reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, pair_logits
from moalign_plugins.objectives._pairs import difference, lengths, reference_tokens

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "sharpening",
    "class": "Sharpening",
    "summary": "regression on the reference's own log-likelihood, to its sharpened distribution; no labels, no scores",
    "paper": "arXiv:2412.01951",
}


class Sharpening(Objective):
    """(s(y1) - s(y2) - z)^2 with z = scale * beta * d - margin, and s(y) = log pi_ref(y), the model's own reward.

    d is the log-ratio to the reference of the first minus that of the second response. arXiv 2412.01951, from memory of
    the paper: its reward for what the model itself finds likely, in the regression of ``rebel``. The minimiser over all
    pairs is pi_ref^(1 + 1/beta) / Z: the reference, sharpened; with ``average`` it is pi_ref * exp(s / beta) / Z.

    Neither labels nor scores are read, so that any pairs will do, whichever response comes first; where the data has
    both, the pairs are those that an objective judged, which the combiner weighs. Under a combiner with margins, such
    as ``modpo``, s stands for the reward of the objective that judged the pair.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})
    symmetric: ClassVar[bool] = True

    beta: float = Field(default=1.0, gt=0)
    """price of a nat of KL from the reference, in nats of its own likelihood"""
    average: bool = False
    """s averaged over the response's tokens, so that short responses are not preferred; false: their sum"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        own = (reference_tokens(batch) * batch.mask).sum(-1)
        own = own / lengths(batch) if self.average else own
        return (difference(batch, own) - pair_logits(batch, terms, self.beta)) ** 2

"""Supervised fine-tuning on the responses that are good enough."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, Objective, PairTerms
from moalign_plugins.objectives._pairs import log_probabilities
from moalign_plugins.objectives._single_responses import Threshold, advantages_of, good

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "filtered",
    "class": "Filtered",
    "summary": "likelihood of the responses whose combined reward is above a threshold",
    "paper": "arXiv:2302.08582",
}


class Filtered(Objective):
    """-log pi(y) of responses whose signal is above ``threshold``, and nothing of the others. arXiv 2302.08582.

    The step's mean is over all responses, those that are left out among them: they take a place in their step, with a
    loss of 0. The threshold 0.5 is for labels of 1 and 0; ``mean`` is that of the round, or of the data. The paper,
    whose scores say how bad a document is, had a number for each task.

    The paper's conditional training, likelihood of all behind a tag that says whether they are good, needs no other
    loss: ``loss: {name: filtered, threshold: -1e9}`` (or any number that all signals are above) with
    ``condition: {name: tags, of: rewards, levels: 1}``, where ``ranges`` give the worst and the best of rewards other
    than 0 and 1; the tag then is that of the nearer one. The paper left the tag out at one of a hundred documents, to
    keep the language model as it was; a tag is never left out here.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups"})
    shiftable: ClassVar[bool] = False

    threshold: Threshold = 0.5
    """responses are kept whose signal is above this number, or above the mean of their round"""
    average: bool = True
    """mean over the response's tokens; false: their sum"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return good(signal, self.threshold).to(signal)

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return -advantages_of(batch) * log_probabilities(batch, average=self.average)

"""Supervised fine-tuning on the best of the responses to each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError
from moalign_plugins.objectives._pairs import log_probabilities
from moalign_plugins.objectives._single_responses import advantages_of, shares_of_best

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "rejection-sampling",
    "class": "RejectionSampling",
    "summary": "likelihood of the best of the responses to each prompt, sampled or of the data (RAFT, DPA)",
    "paper": "arXiv:2304.06767, arXiv:2402.18571",
}


class RejectionSampling(Objective):
    """-log pi(y) of the ``keep`` best of the G responses to a prompt, and nothing of the others.

    The step's mean is over all responses, so that a kept one counts G / keep times. Of equal signals the earlier
    response is kept. arXiv 2304.06767 (RAFT); for drawn preferences, with the text of each, arXiv 2402.18571 (DPA).

    In both nothing but the policy's own responses holds it back, and round after round it goes on to leave the
    reference. With ``beta`` the best is that of signal - beta (log pi - log pi_ref): a response that the policy already
    gives far more often than the reference has to be better by as much. Without rollouts the responses are the data's,
    which count as the reference's own: their log-ratios are 0, and beta changes nothing; nor does it where the
    reference is the previous iterate, whose own they are.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"beta": frozenset({"reference"})}
    shiftable: ClassVar[bool] = False

    keep: int = Field(default=1, ge=1)
    """of the responses to a prompt"""
    beta: float = Field(default=0.0, ge=0)
    """price of a nat of the log-ratio to the reference where responses are chosen, in units of the signal; 0 as in the
    papers"""
    average: bool = True
    """mean over the response's tokens; false: their sum"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        if self.beta:
            if log_ratios is None:
                raise PluginError('the loss reads log-ratios but does not declare "reference" in `needs`')
            signal = signal - self.beta * log_ratios
        return shares_of_best(signal, groups, self.keep)

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return -advantages_of(batch) * log_probabilities(batch, average=self.average)

"""Value-incentivised preference optimisation, offline."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, log_ratios
from moalign_plugins.objectives._pairs import logistic, of_pairs, shifted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "vpo",
    "class": "VPO",
    "summary": "DPO with pessimism about responses other than the chosen ones",
    "paper": "arXiv:2405.19320",
}


class VPO(Objective):
    """-log sigmoid(z) - alpha * beta * a(yw), with z = scale * beta * d - margin and a the log-ratio to the reference.

    d = a(yw) - a(yl), all summed over tokens. arXiv 2405.19320 in its offline form: the value of the best policy under
    the learned reward is kept low (pessimism) by raising the likelihood of a calibration policy's responses, here the
    chosen ones. The gradient is that of ``rpo`` with eta = alpha. The online form has the other sign, and responses of
    the reference in the place of the chosen ones, which labelled pairs do not have.

    From memory of the paper, whose values of alpha we could not read; 0.005 is that of ``rpo``. A combiner's scale and
    margin act on z alone, its weight on the whole loss.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""
    alpha: float = Field(default=0.005, ge=0)
    """strength of the pessimism; 0 is DPO"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        chosen, rejected = of_pairs(batch, log_ratios(batch))
        return logistic(shifted(terms, self.beta, chosen - rejected)) - self.alpha * self.beta * chosen

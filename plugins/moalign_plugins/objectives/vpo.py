"""Value-incentivised preference optimisation, pessimistic or optimistic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, log_ratios
from moalign_plugins.objectives._optimism import of_reference_responses
from moalign_plugins.objectives._pairs import logistic, of_pairs, shifted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "vpo",
    "class": "VPO",
    "summary": "DPO with pessimism about responses other than the chosen ones, or with optimism",
    "paper": "arXiv:2405.19320",
}


class VPO(Objective):
    """-log sigmoid(z) - alpha * beta * a(yw), with z = scale * beta * d - margin and a the log-ratio to the reference.

    d = a(yw) - a(yl), all summed over tokens. arXiv 2405.19320 in its offline form: the value of the best policy under
    the learned reward is kept low (pessimism) by raising the likelihood of a calibration policy's responses, here the
    chosen ones. The gradient is that of ``rpo`` with the sum and eta = alpha.

    With ``optimistic`` it is the online form, + alpha * beta * a(y0), y0 a response of the reference to the pair's
    prompt: the value is kept high by lowering the likelihood of what the reference says, which is the loss of ``selm``,
    where more is said of y0. The paper samples new pairs from the policy in each iteration, as rollouts do.

    From memory of the paper, whose values of alpha we could not read; 0.005 is that of ``rpo``. A combiner's scale and
    margin act on z alone, its weight on the whole loss.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"optimistic": frozenset({"reference_responses"})}

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""
    alpha: float = Field(default=0.005, ge=0)
    """strength of the pessimism, or of the optimism; 0 is DPO"""
    optimistic: bool = False
    """false: the offline form; true: the online form, with responses of the reference"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        ratios = log_ratios(batch)
        chosen, rejected = of_pairs(batch, ratios)
        calibration = -of_reference_responses(batch, ratios) if self.optimistic else chosen
        return logistic(shifted(terms, self.beta, chosen - rejected)) - self.alpha * self.beta * calibration

"""Length-normalised direct preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, Objective, PairTerms, log_ratios
from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor


class LNDPO(Objective):
    """-log sigmoid(z) with z = scale * beta * d - margin, d the difference of log-ratios per token. arXiv:2407.15229.

    For two responses of L tokens each it is DPO with beta / L.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=2.0, gt=0)
    """strength of the KL penalty towards the reference, per token; larger than DPO's by about a response's length"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        from torch.nn.functional import logsigmoid

        ratios = log_ratios(batch) / batch.mask.sum(-1).clamp(min=1)  # a row of no pair may be empty
        difference = ratios[batch.pairs[:, 0]] - ratios[batch.pairs[:, 1]]
        return -logsigmoid(terms.scale * self.beta * difference - terms.margin)

"""Direct preference optimisation with a reward for each token that guides it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, pair_logits
from moalign_plugins.objectives._pairs import logistic, of_pairs, reference_tokens, shifted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "tgdpo",
    "class": "TGDPO",
    "summary": "DPO whose log-ratios are weighed token by token, by the implicit reward of a trained adapter",
    "paper": "arXiv:2506.14574",
}


class TGDPO(Objective):
    """-log sigmoid(z), z = scale * beta * D - margin, D a difference of weighed sums over the tokens t of a pair:

    D = sum_t (1 + alpha g_t(yw)) a_t(yw) - sum_t (1 - alpha g_t(yl)) a_t(yl), a_t = log pi - log pi_ref of a token, and
    g_t = beta (log pi_guide - log pi_ref), a constant, of an adapter that was trained with DPO or SimPO and is frozen.
    So a token that the guide likes weighs more in the chosen response and less in the rejected one. The weights are
    not bounded, and may be negative. With alpha 0, or a guide that is the reference, it is DPO.

    arXiv 2506.14574; beta 0.1 and alpha 0.5 are of its authors' code, where beta is one for both as well. The guide's
    log-probabilities are computed once for each sequence and kept, as the reference's.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    guide: str
    """folder of a trained adapter of the same base model, such as runs/first/candidates/only-helpful; with {candidate}
    in place of the last name, each candidate's own"""
    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference, and scale of the guide's rewards"""
    alpha: float = Field(default=0.5, ge=0)
    """how much the guide's rewards change the weights of the tokens; 0 is DPO"""

    def guides(self) -> Mapping[str, str]:
        return {"guide": self.guide} if self.alpha else {}

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        if not self.alpha:
            return logistic(pair_logits(batch, terms, self.beta))
        reference = reference_tokens(batch)
        ratios = (batch.logps - reference) * batch.mask
        guidance = self.alpha * self.beta * (batch.guides["guide"] - reference)
        chosen, _ = of_pairs(batch, ((1 + guidance) * ratios).sum(-1))
        _, rejected = of_pairs(batch, ((1 - guidance) * ratios).sum(-1))
        return logistic(shifted(terms, self.beta, chosen - rejected))

"""AlignDistil with one teacher: the simple variant, between the reference and a DPO adapter or beyond it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms
from moalign_plugins.objectives._distillation import distribution, divergence, over_pairs
from moalign_plugins.objectives._pairs import refuse_terms

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "align-distil-simple",
    "class": "AlignDistilSimple",
    "summary": "distillation from a mix of logits of a DPO adapter and the reference: RLHF on its token rewards",
    "paper": "arXiv:2503.02832",
}


class AlignDistilSimple(Objective):
    """kl_weight KL(pi || softmax(s z + (1 - s) z_ref)), s = beta / kl_weight, of each response token.

    z and z_ref [S,V] are log-probabilities of the whole vocabulary under a frozen adapter trained with DPO, and under
    the reference. The mean is over a response's tokens, then over the pair; no label is read. The target maximises
    E_pi[beta (z - z_ref)] - kl_weight KL(pi || pi_ref), so that it is RLHF with DPO's reward of each token: with
    kl_weight = beta it gives the DPO adapter back, and a smaller one goes beyond. arXiv 2503.02832; beta 0.1 is of its
    authors' code, and kl_weight 0.05 ours.

    Memory as for ``align-distil``: 4 bytes each for S tokens of a pass times V, for policy, target, adapter, reference
    and gradient. A combiner's scale and margin ask for a logit, which is not here: they are refused.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference", "distributions"})
    shiftable: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True

    teacher: str
    """folder of an adapter trained with DPO, such as runs/first/candidates/only-helpful; with {candidate} in place of
    the last name, each candidate's own"""
    beta: float = Field(default=0.1, gt=0)
    """that of the teacher's DPO: what makes its log-ratios rewards"""
    kl_weight: float = Field(default=0.05, gt=0)
    """strength of the KL penalty towards the reference"""

    def guides(self) -> Mapping[str, str]:
        return {"teacher": self.teacher}

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        refuse_terms("align-distil-simple", terms)
        share = self.beta / self.kl_weight
        teacher, reference = (distribution(batch, name) for name in ("teacher", "reference"))
        target = (share * teacher + (1 - share) * reference).log_softmax(-1)
        return over_pairs(batch, self.kl_weight * divergence(distribution(batch, "policy"), target))

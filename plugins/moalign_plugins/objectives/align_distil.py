"""AlignDistil: distillation, token by token, from what two contrary adapters disagree on."""

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
    "name": "align-distil",
    "class": "AlignDistil",
    "summary": "distillation from a DPO adapter pushed away from its reverse, further where the two disagree",
    "paper": "arXiv:2503.02832",
}


class AlignDistil(Objective):
    """(beta / k) KL(pi || softmax(z + k (z - z_rev))) of each response token, mean over a response, then over the pair.

    z and z_rev [S,V] are log-probabilities of the whole vocabulary under two frozen adapters, one trained with DPO, the
    other with DPO on the same pairs with their labels swapped. k = slope * tvd + floor of each token, tvd the sum of
    |p - p_rev| over the vocabulary, without the half, from 0 to 2. No label is read: pairs are where responses come
    from. arXiv 2503.02832; all defaults are of its authors' code.

    The factor beta / k is 100 where both agree, so that such tokens have the largest weight, with the DPO adapter as
    their teacher. Memory: policy, teacher and both adapters take 4 bytes each for S tokens of a pass times V, and the
    gradient as much again; a smaller train.tokens_per_pass needs less. A combiner's scale and margin ask for a logit,
    which is not here: they are refused.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "distributions"})
    shiftable: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True

    teacher: str
    """folder of an adapter trained with DPO, such as runs/first/candidates/only-helpful; with {candidate} in place of
    the last name, each candidate's own"""
    contrary: str
    """folder of an adapter of the same base that was trained with the labels swapped"""
    beta: float = Field(default=0.1, gt=0)
    """that of the teacher's DPO; scales the loss"""
    slope: float = Field(default=15.0, ge=0)
    """how much further than the teacher the target is where the two adapters disagree"""
    floor: float = Field(default=1e-3, gt=0)
    """how much further it is where they agree"""

    def guides(self) -> Mapping[str, str]:
        return {"teacher": self.teacher, "contrary": self.contrary}

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        refuse_terms("align-distil", terms)
        teacher, contrary = (distribution(batch, name) for name in ("teacher", "contrary"))
        apart = (teacher.exp() - contrary.exp()).abs().sum(-1)
        k = self.slope * apart + self.floor
        target = (teacher + k[:, None] * (teacher - contrary)).log_softmax(-1)
        return over_pairs(batch, self.beta / k * divergence(distribution(batch, "policy"), target))

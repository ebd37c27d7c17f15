"""Chi-squared preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, log_ratios
from moalign_plugins.objectives._pairs import bounded_expm1, difference, logistic, shifted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "chi-po",
    "class": "ChiPO",
    "summary": "DPO for policies held by a chi-squared divergence beside the KL",
    "paper": "arXiv:2407.13399",
}


class ChiPO(Objective):
    """-log sigmoid(z), z = scale * beta * [phi(yw) - phi(yl)] - margin, with phi = u + log u and u = pi(y) / pi_ref(y).

    arXiv 2407.13399. phi is the slope of (u - 1)^2 / 2 + u log u: where z is the reward difference, pi maximises
    reward - beta * [chi2(pi || ref) / 2 + KL(pi || ref)]. As chi2 >= KL, it stays closer to the reference where it
    would leave it far behind, which is where rewards that only correlate with the wanted one stop to do so (arXiv
    2403.03185).

    The paper clips the difference of two rewards to [-2R, 2R], R the most that one can be: ``clip`` is R, acts on z,
    and a pair beyond it has no gradient. A log-ratio above 20 is where u is replaced by the tangent of exp there, so
    that phi is finite and goes on to rise. The default beta is that of ``dpo``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """price of the divergence, in units of the reward"""
    clip: float | None = Field(default=None, gt=0)
    """largest size R of a reward: logits stay within 2R; none: they are not clipped"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        ratios = log_ratios(batch)
        logits = shifted(terms, self.beta, difference(batch, bounded_expm1(ratios) + ratios))
        if self.clip is not None:
            logits = logits.clamp(-2 * self.clip, 2 * self.clip)
        return logistic(logits)

"""Direct preference optimisation under other divergences than the reverse KL."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, log_ratios
from moalign_plugins.objectives._pairs import bounded_expm1, difference, logistic, shifted

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "f-dpo",
    "class": "FDPO",
    "summary": "DPO for policies held by a forward KL, Jensen-Shannon or alpha-divergence",
    "paper": "arXiv:2309.16240",
}


class FDPO(Objective):
    """-log sigmoid(z), z = scale * beta * [g(a(yw)) - g(a(yl))] - margin, with a the log-ratio to the reference.

    g(a) = f'(exp(a)), up to a constant, of the divergence E_ref[f(pi / ref)]; pi maximises reward - beta * divergence
    where z is the reward difference. arXiv 2309.16240, table 1.

    reverse-kl  a                                KL(pi || ref), which is DPO
    forward-kl  1 - exp(-a)                      KL(ref || pi)
    js          log 2 + log sigmoid(a)           KL(pi || mean) + KL(ref || mean), twice the Jensen-Shannon divergence
    alpha       (1 - exp(-alpha * a)) / alpha    between them: alpha to 0 is reverse-kl, 1 is forward-kl

    TRL's coefficient is 1 - alpha. In forward-kl and alpha a response far less likely than under the reference has an
    exponent -a or -alpha * a beyond 20: from there on exp is replaced by its tangent at 20, so that g is finite and
    goes on to rise, with a slope of 5e8, for every response. The paper has js with beta 0.3 for dialogue, and beta 0.01
    and alpha from 0.1 to 0.9 for reviews; the defaults are between these.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """price of the divergence, in units of the reward"""
    divergence: Literal["reverse-kl", "forward-kl", "js", "alpha"] = "js"
    """from the reference"""
    alpha: float = Field(default=0.5, gt=0, le=1)
    """of the alpha-divergence; read by no other"""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        links = self.link(log_ratios(batch))
        return logistic(shifted(terms, self.beta, difference(batch, links)))

    def link(self, ratios: Tensor) -> Tensor:
        """g of log-ratios, 0 at 0."""
        from torch.nn.functional import logsigmoid

        if self.divergence == "reverse-kl":
            return ratios
        if self.divergence == "js":
            return logsigmoid(ratios) + math.log(2)
        alpha = self.alpha if self.divergence == "alpha" else 1.0
        return -bounded_expm1(-alpha * ratios) / alpha

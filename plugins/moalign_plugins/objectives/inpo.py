"""Iterative Nash policy optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError
from moalign_plugins.objectives._pairs import difference

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "inpo",
    "class": "INPO",
    "summary": "squared loss of a step of mirror descent towards the Nash policy, between the base and the reference",
    "paper": "arXiv:2407.00617",
}


class INPO(Objective):
    """(scale * h - margin / eta - 1 / (2 eta))^2, the paper's (h - 1 / (2 eta))^2 at scale 1 and margin 0.

    h = l(w) - l(l) - q (l_base(w) - l_base(l)) - (1 - q) (l_t(w) - l_t(l)), with log-probabilities of whole responses,
    q = tau / eta, and pi_t the reference, which is meant to be the policy that sampled the pairs:

        rollouts: {...}
        reference: previous-iterate

    arXiv 2407.00617; its authors' code was not found, and the form is that of the code which others published with
    COMAL (yale-nlp/COMAL), whose script has eta 0.002 and q 1/3. Over pairs from pi_t that are labelled with
    probability P(y > y') the minimiser is proportional to exp(P(y > pi_t) / eta) base^q pi_t^(1 - q), a step towards
    the Nash policy of the preference game with a KL of weight tau to the base. With q = 1, or with the base as the
    reference, it is IPO at beta = eta.

    The margin of a pair is 1 / (2 eta) nats: 250 at the default eta, where the policy will not get in a few rounds.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference", "base"})

    eta: float = Field(default=0.002, gt=0)
    """weight of the KL of each round; the target of h is 1 / (2 eta)"""
    base_share: float = Field(default=1 / 3, ge=0, le=1)
    """q = tau / eta: how much of the pull is to the base, and how much to the reference"""

    @property
    def beta(self) -> float:
        """What the metrics multiply log-ratios by."""
        return self.eta

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        if batch.ref_logps is None or batch.base_logps is None:
            raise PluginError("objective 'inpo' reads log-probabilities under the reference and under the base")
        anchor = self.base_share * batch.base_logps + (1 - self.base_share) * batch.ref_logps
        ratios = ((batch.logps - anchor) * batch.mask).sum(-1)
        h = difference(batch, ratios)
        return (terms.scale * h - (terms.margin + 0.5) / self.eta) ** 2

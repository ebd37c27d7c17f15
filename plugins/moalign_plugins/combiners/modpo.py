"""Multi-objective DPO as terms of a pairwise loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, Combiner, PairTerms, Preference, PreferenceError
from moalign_plugins.combiners._margins import margins_needed, terms_with_margins
from moalign_plugins.combiners._scalarised import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "modpo",
    "class": "MODPO",
    "summary": "multi-objective DPO: the other objectives' rewards enter as a margin",
    "paper": "arXiv:2310.03708",
}


class MODPO(Combiner):
    """scale 1 / w_k and margin sum_{j != k} (w_j / w_k) dr_j for a pair that objective k judged. arXiv 2310.03708.

    dr_j is the reward of the chosen minus that of the rejected response under objective j, so a pairwise loss sees
    (beta * d - sum_{j != k} w_j dr_j) / w_k, the difference in r_k alone. Whichever objective labelled the pairs, the
    minimiser is reference * exp(w.r / beta) / Z. The paper labels all pairs by one objective and shows k = 1.

    The weight is w_k: it cancels the 1 / w_k in the slope of the loss, so that gradients of losses with a bounded slope
    (dpo, rpo) stay bounded as w_k goes to 0; those of squared losses still grow like 1 / w_k. Pairs with w_k = 0 (or
    below 1e-20, as float32 has to hold the quotients) have weight 0, and scale 1 and margin 0. A one-hot preference
    needs no margins and is the plain loss.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled"})
    weighted_sums: ClassVar[bool] = True
    weighs_judges: ClassVar[bool] = True

    def check(self, preference: Preference) -> None:
        if preference.kind != "weights":
            raise PreferenceError(f"combiner 'modpo' divides by the weights of objectives; it has no {preference.kind}")

    def needs(self, preference: Preference) -> frozenset[str]:
        return margins_needed(preference)

    def pair_terms(self, batch: Batch) -> PairTerms:
        return terms_with_margins(batch, batch.margins, "modpo")

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return weighted_sum(rewards, preference)

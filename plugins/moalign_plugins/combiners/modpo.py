"""Multi-objective DPO as terms of a pairwise loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, Combiner, PairTerms, PluginError, Preference, PreferenceError, pair_preference

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "modpo",
    "class": "MODPO",
    "summary": "multi-objective DPO: the other objectives' rewards enter as a margin",
    "paper": "arXiv:2310.03708",
}

_SMALLEST = 1e-20  # weight by which margins are divided


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
    weighs_judges: ClassVar[bool] = True

    def check(self, preference: Preference) -> None:
        if preference.kind != "weights":
            raise PreferenceError(f"combiner 'modpo' divides by the weights of objectives; it has no {preference.kind}")

    def needs(self, preference: Preference) -> frozenset[str]:
        carrying = sum(value > 0 for value in preference.values.values())
        return frozenset({"margins"}) if carrying > 1 else frozenset()

    def pair_terms(self, batch: Batch) -> PairTerms:
        import torch

        judge = batch.pair_objective[:, None]
        if bool((judge < 0).any()):
            raise PluginError("combiner 'modpo' needs to know which objective judged a pair; combine with 'linear'")
        preference = pair_preference(batch)
        own = preference.gather(1, judge).squeeze(1)
        counts = own >= _SMALLEST
        others = preference.scatter(1, judge, 0.0) * counts[:, None]
        safe = torch.where(counts, own, torch.ones_like(own))
        _refuse_unknown(batch, others)
        margin = torch.zeros_like(own) if batch.margins is None else self.scalarise(batch.margins, others) / safe
        return PairTerms(scale=1 / safe, margin=margin, weight=own * counts)

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return (rewards.masked_fill(preference == 0, 0.0) * preference).sum(-1)


def _refuse_unknown(batch: Batch, weights: Tensor) -> None:
    """Raise PluginError where a margin that carries weight (``weights`` [P,M]) is missing or not finite."""
    carries = weights != 0
    if batch.margins is None:
        if bool(carries.any()):
            raise PluginError("combiner 'modpo' needs the margins of the other objectives, and the batch has none")
        return
    unknown = carries & ~batch.margins.isfinite()
    if bool(unknown.any()):
        pair, objective = unknown.nonzero()[0].tolist()
        raise PluginError(
            f"combiner 'modpo': the margin of objective {objective} is unknown for pair {pair} of the batch, and the "
            f"preference gives it the weight {float(pair_preference(batch)[pair, objective]):g}"
        )

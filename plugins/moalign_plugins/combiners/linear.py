"""Linear scalarisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, Combiner, PairTerms, PluginError, Preference, PreferenceError, pair_preference

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "linear",
    "class": "Linear",
    "summary": "weighted sum: of the losses of labelled pairs, of the rewards of scored ones",
}


class Linear(Combiner):
    """The reward is sum_j w_j r_j; a pair that objective k judged counts w_k times.

    Scale is 1 and margin 0: a pairwise loss sees each judgement as it is, and the losses of the objectives are summed
    with their weights (a pair that no single objective judged counts once). Regression losses get the scalarised reward
    difference, those on sampled responses the scalarised reward.

    For labelled pairs this is a weighted sum of losses, as MPO (arXiv 2411.10442) has it of several losses; here it is
    one loss, on the pairs of each objective: sum_k w_k (n_k / P) L_k, L_k the mean loss of the n_k of P pairs that k
    judged, so that an objective with more pairs counts more. "chebyshev" and its kin weigh the L_k themselves.

    Directions work too (a unit vector v with components of any sign, DPA, arXiv 2402.18571); with a negative component
    only where no pair is labelled by that objective.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled", "scored", "groups"})
    weighted_sums: ClassVar[bool] = True
    weighs_judges: ClassVar[bool] = True

    def check(self, preference: Preference) -> None:
        if preference.kind == "thresholds":
            bounds = ", ".join(f"{name} >= {value:g}" for name, value in preference.values.items())
            raise PreferenceError(
                f"combiner 'linear' has no meaning for thresholds ({bounds}); give weights; 'lagrangian' and "
                "'interior-point' keep them"
            )

    def pair_terms(self, batch: Batch) -> PairTerms:
        import torch

        preference = pair_preference(batch)
        own = preference.gather(1, batch.pair_objective.clamp(min=0)[:, None]).squeeze(1)
        weight = torch.where(batch.pair_objective >= 0, own, torch.ones_like(own))
        if bool((weight < 0).any()):
            pair = int((weight < 0).nonzero()[0])
            raise PluginError(
                f"combiner 'linear': objective {int(batch.pair_objective[pair])} has the negative weight "
                f"{float(own[pair]):g}, and a judgement cannot count less than nothing; use a loss on reward "
                "differences such as 'rebel'"
            )
        difference = None if batch.margins is None else self.scalarise(batch.margins, preference)
        return PairTerms(torch.ones_like(own), torch.zeros_like(own), weight, difference)

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return (rewards.masked_fill(preference == 0, 0.0) * preference).sum(-1)

"""What rules share in which the other objectives' rewards stand as a margin in a pairwise loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.api import Batch, PairTerms, PluginError, Preference, pair_preference
from moalign_plugins.combiners._judged import is_labelled
from moalign_plugins.combiners._scalarised import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-20  # weight by which margins are divided


def margins_needed(preference: Preference) -> frozenset[str]:
    """Margins, unless one objective has all the weight."""
    carrying = sum(value > 0 for value in preference.values.values())
    return frozenset({"margins"}) if carrying > 1 else frozenset()


def terms_with_margins(batch: Batch, margins: Tensor | None, name: str) -> PairTerms:
    """Scale 1 / w_k, margin sum_{j != k} (w_j / w_k) margins_j and weight w_k for a pair that objective k judged.

    ``margins`` [P,M]: of the chosen response over the rejected one; a pair with w_k below 1e-20 has weight 0, scale 1
    and margin 0, as float32 has to hold the quotients. ``name``: of the combiner. Raises PluginError where no single
    objective judged a pair, or a margin with weight is unknown.
    """
    import torch

    if not is_labelled(batch):
        raise PluginError(f"combiner '{name}' needs to know which objective judged a pair; combine with 'linear'")
    judge, preference = batch.pair_objective[:, None], pair_preference(batch)
    own = preference.gather(1, judge).squeeze(1)
    counts = own >= SMALLEST
    others = preference.scatter(1, judge, 0.0) * counts[:, None]
    safe = torch.where(counts, own, torch.ones_like(own))
    _refuse_unknown(margins, others, preference, name)
    margin = torch.zeros_like(own) if margins is None else weighted_sum(margins, others) / safe
    return PairTerms(scale=1 / safe, margin=margin, weight=own * counts)


def _refuse_unknown(margins: Tensor | None, weights: Tensor, preference: Tensor, name: str) -> None:
    """Raise PluginError where a margin that carries weight (``weights`` [P,M]) is missing or not finite."""
    carries = weights != 0
    if margins is None:
        if bool(carries.any()):
            raise PluginError(f"combiner '{name}' needs the margins of the other objectives, and the batch has none")
        return
    unknown = carries & ~margins.isfinite()
    if bool(unknown.any()):
        pair, objective = unknown.nonzero()[0].tolist()
        raise PluginError(
            f"combiner '{name}': the margin of objective {objective} is unknown for pair {pair} of the batch, and the "
            f"preference gives it the weight {float(preference[pair, objective]):g}"
        )

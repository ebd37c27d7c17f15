"""What rules for labelled pairs share: the losses as they are, one objective's pairs apart from another's."""

from __future__ import annotations

from moalign.api import Batch, PairTerms, PluginError, pair_preference


def is_labelled(batch: Batch) -> bool:
    """Whether one objective judged each of the pairs."""
    return bool((batch.pair_objective >= 0).all())


def plain_terms(batch: Batch, name: str) -> PairTerms:
    """Scale 1 and margin 0; weight 1 where the judge has weight, else 0. ``name``: of the combiner.

    Raises PluginError where no single objective judged a pair.
    """
    if not is_labelled(batch):
        raise PluginError(f"combiner '{name}' needs to know which objective judged a pair; combine with 'linear'")
    own = pair_preference(batch).gather(1, batch.pair_objective[:, None]).squeeze(1)
    one = own * 0 + 1
    return PairTerms(one, 0 * one, (own > 0).to(own.dtype))

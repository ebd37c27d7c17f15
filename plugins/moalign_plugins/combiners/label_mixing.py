"""One soft label for each pair, mixed from the verdicts of all objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, Combiner, PairTerms, PluginError, Preference, pair_preference
from moalign_plugins.combiners._preferences import needs_weights
from moalign_plugins.combiners._scalarised import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "label-mixing",
    "class": "LabelMixing",
    "summary": "a pair's label is the weighted share of the objectives that prefer its first response",
}


class LabelMixing(Combiner):
    """q L(z) + q' L(-z), q = sum_k w_k [objective k prefers the first response], q' the same of the second.

    L(-z) is the loss of the pair the other way round, so that losses which are no function of the logit alone (rpo,
    sft) are mixed as exactly. Where all objectives with weight judged a pair without a tie q + q' = 1: a soft label. An
    objective that did not judge it, or found a tie, adds to neither, and nothing is renormalised.

    The sum over all data is that of "linear": sum_k w_k of the losses of the objectives' own pairs, but each two
    responses come up once, with the verdicts of all, and not once for each judge at some other time. So what objectives
    disagree on is weighed within a step, and the gradient has less noise. (Judgements that one objective repeats count
    once, as their mean.) A one-hot preference trains on that objective's pairs as they are.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled"})
    weighs_judges: ClassVar[bool] = True
    merges_judges: ClassVar[bool] = True

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "label-mixing")

    def pair_terms(self, batch: Batch) -> PairTerms:
        if batch.preferred is None:
            raise PluginError("combiner 'label-mixing' mixes the verdicts of all objectives, and the batch has none")
        weights, first = pair_preference(batch), batch.preferred.nan_to_num(0.0)
        second = (1 - batch.preferred).nan_to_num(0.0)
        one = weights.new_ones(len(batch.pairs))
        return PairTerms(one, 0 * one, (weights * first).sum(1), reversed=(weights * second).sum(1))

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return weighted_sum(rewards, preference)

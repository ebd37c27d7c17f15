"""Rules for pairs that bend each objective's rewards around a reference before they are weighed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Combiner, PairTerms, PluginError, Preference
from moalign_plugins.combiners._judged import is_labelled
from moalign_plugins.combiners._margins import margins_needed, terms_with_margins
from moalign_plugins.combiners._preferences import by_objective, needs_weights
from moalign_plugins.combiners._scalarised import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


class ShapedMargins(Combiner):
    """The reward is sum_k w_k f(c (r_k - ref_k)), f increasing; subclasses say which.

    A loss on scored pairs gets the difference of that sum. On labelled pairs it is a margin as "modpo" has it: scale
    1 / w_k, margin sum_{j != k} (w_j / w_k) of the differences of f, weight w_k; the objective k that judged the pair
    stands there as it judged, unbent, so that the minimiser is that of the reward w_k r_k + sum_{j != k} w_j f_j.

    What the papers take for ref, such as rewards of the untouched base's responses to the prompt, is not known of pairs
    from files: it is an option, in the rewards' own unit. (The other response of the pair would be no reference: the
    difference of log-sigmoids of +- c (r - r') is c (r - r') itself.) Implicit rewards (``data.margins: implicit``) are
    known but for a number for each prompt, with which the rule would mean something else for each: they are refused.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled", "scored"})
    weighs_judges: ClassVar[bool] = True
    reads_levels: ClassVar[bool] = True
    called: ClassVar[str]

    reference: float | dict[str, float]
    """the reward around which it bends, one number or one for each objective"""
    slope: float = Field(default=1.0, gt=0)
    """c, in units of 1 / reward"""

    def bent(self, shifted: Tensor) -> Tensor:
        """f, of any shape."""
        raise NotImplementedError

    def check(self, preference: Preference) -> None:
        needs_weights(preference, self.called)
        by_objective(self.reference, preference, self.called, "reference")

    def needs(self, preference: Preference) -> frozenset[str]:
        return margins_needed(preference)

    def pair_terms(self, batch: Batch) -> PairTerms:
        import torch

        values = None if batch.rewards is None else self._shaped(batch.rewards, batch.objectives)
        differences = None if values is None else values[batch.pairs[:, 0]] - values[batch.pairs[:, 1]]
        if is_labelled(batch):
            return terms_with_margins(batch, differences, self.called)
        if differences is None:
            raise PluginError(f"combiner '{self.called}' bends rewards, and the batch has none")
        one = torch.ones_like(differences[:, 0])
        total = weighted_sum(differences, batch.preference[batch.pairs[:, 0]])
        return PairTerms(one, 0 * one, one, total)

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return weighted_sum(self._shaped(rewards, ()), preference)

    def _shaped(self, rewards: Tensor, names: tuple[str, ...]) -> Tensor:
        """f of each reward [..., M]; ``names``: of the objectives, where they are known."""
        known = self.reference
        if not isinstance(known, Mapping):
            return self.bent(self.slope * (rewards - known))
        if not names:
            raise PluginError("a reference for each objective goes by their names, and nobody says these")
        return self.bent(self.slope * (rewards - rewards.new_tensor([known[name] for name in names])))

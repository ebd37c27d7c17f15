"""The kind combiner: from many objectives and a preference to one signal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from moalign.api.plugin import Plugin
from moalign.batch import Batch, PairTerms, Round, StepLosses
from moalign.types import Preference

if TYPE_CHECKING:
    from torch import Tensor


class Combiner(Plugin):
    """Many objectives and a preference -> one signal.

    ``accepts`` says which pairs the rule has a meaning for: "labelled" (one objective judged the pair) and "scored"
    (every objective scored both responses, as regression losses use them). "groups": the rule combines the rewards of
    sampled responses (``signal``).
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled", "scored"})
    weighs_judges: ClassVar[bool] = False
    """whether a pair judged by an objective without weight has weight 0; then it takes no place in a step"""
    monotone: ClassVar[bool] = True
    """whether a larger reward never makes the result smaller, where no weight is negative"""
    weighted_sums: ClassVar[bool] = False
    """whether weights are those of a weighted sum of the rewards, so that the policy trained for them is meant to have
    the largest of all; what searches may suppose that follow such sums"""
    reward_range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    """the rewards that the rule has a meaning for"""
    pointwise: ClassVar[bool] = True
    """whether a response's ``signal`` depends on no other response, given the state; else there is none for a greedy
    response beside the samples, and losses that need one are refused"""
    needs_gram: ClassVar[bool] = False
    """whether ``observe`` and ``observe_losses`` read the inner products of the objectives' gradients (``gram``)"""
    weighs_losses: ClassVar[bool] = False
    """whether the rule weighs the mean losses of labelled pairs by objective, anew in each step (``loss_weights``)"""
    merges_judges: ClassVar[bool] = False
    """whether two responses that objectives have judged are one labelled pair for all of them (``Batch.preferred``),
    which no single one judged"""
    reads_levels: ClassVar[bool] = False
    """whether ``pair_terms`` reads the rewards of labelled pairs themselves, and not only what they differ by between
    responses to one prompt; then implicit rewards, which are known but for a number for each prompt, are refused"""

    def check(self, preference: Preference) -> None:
        """Raise PreferenceError where this rule has no meaning for the preference. Called before a model is loaded."""

    def needs(self, preference: Preference) -> frozenset[str]:
        """What ``pair_terms`` reads beside the pairs: empty, or {"margins"}."""
        return frozenset()

    def pair_terms(self, batch: Batch) -> PairTerms:
        """Scale, margin and weight of every pair; see PairTerms."""
        raise NotImplementedError

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        """rewards [..., M], preference [..., M] -> [...]; NaN where a reward that carries weight is unknown."""
        raise NotImplementedError

    def init(self, preference: Preference) -> Mapping[str, Any]:
        """The state with which a candidate's training begins, as plain data; for rules that adapt.

        The preference's values stand in the order of the objectives. Numbers in the state, and in mappings in it, are
        among the metrics, as ``combine/NAME`` and ``combine/NAME/KEY``.
        """
        return {}

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        """The state after a round of sampled responses, before ``signal`` is asked for them; a new one."""
        return state

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        """One number for each sampled response: rewards [N,M], preference [N,M], groups [N] -> [N].

        All are float64 but the groups, which are whole numbers: those of one prompt share one. A preference of
        thresholds has NaN for the objectives without one. The rewards are as transforms left them.
        """
        return self.scalarise(rewards, preference)

    def observe_losses(self, state: Mapping[str, Any], seen: StepLosses) -> Mapping[str, Any]:
        """The state after the losses of a step, before it is asked for ``loss_weights``; a new one.

        Asked in every step on labelled pairs where the rule ``weighs_losses``; the losses, and the gradients behind
        them, are those of the very step that the weights are for.
        """
        return state

    def loss_weights(self, state: Mapping[str, Any]) -> Mapping[str, float]:
        """What the mean loss of each objective is multiplied by in this step, by the objective's name; not below 0.

        The step follows the sum, whatever the number of pairs that each judged. ``PairTerms.weight`` counts within an
        objective.
        """
        raise NotImplementedError

    def multiplier(self, state: Mapping[str, Any]) -> float:
        """What all advantages are multiplied by; a factor on rewards would be lost where they are standardised."""
        return 1.0

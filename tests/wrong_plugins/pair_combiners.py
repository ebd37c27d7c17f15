"""Rules for labelled pairs that are wrong in one way each: of losses by objective, and of pairs with several judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from moalign.api import Batch, Combiner, PairTerms, Preference, PreferenceError, StepLosses, pair_preference


class Steady(Combiner):
    """Right: each loss counts as its objective is preferred, where it judged a pair."""

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled"})
    weighs_losses: ClassVar[bool] = True

    def check(self, preference: Preference) -> None:
        if preference.kind != "weights":
            raise PreferenceError(f"weights are wanted, not {preference.kind}")

    def pair_terms(self, batch: Batch) -> PairTerms:
        one = torch.ones_like(pair_preference(batch)[:, 0])
        return PairTerms(one, 0 * one, one)

    def observe_losses(self, state: Mapping[str, Any], seen: StepLosses) -> Mapping[str, Any]:
        return {"weights": dict(zip(seen.objectives, self.found(seen).tolist(), strict=True))}

    def found(self, seen: StepLosses) -> Tensor:
        return seen.preference * (seen.pairs > 0)

    def loss_weights(self, state: Mapping[str, Any]) -> Mapping[str, float]:
        weights: Mapping[str, float] = state["weights"]
        return weights


class AgainstTheLoss(Steady):
    """Raises the loss of an objective that judged no pair."""

    def found(self, seen: StepLosses) -> Tensor:
        return super().found(seen) - 0.1 * (seen.pairs == 0)


class LossesInPlace(Steady):
    """Writes into the losses that it is shown."""

    def found(self, seen: StepLosses) -> Tensor:
        seen.losses.mul_(2.0)
        return super().found(seen)


class NamesOneOnly(Steady):
    """Says nothing of the others."""

    def loss_weights(self, state: Mapping[str, Any]) -> Mapping[str, float]:
        return dict(list(super().loss_weights(state).items())[:1])


class LossesAsTensors(Steady):
    """Keeps a tensor."""

    def observe_losses(self, state: Mapping[str, Any], seen: StepLosses) -> Mapping[str, Any]:
        return {**super().observe_losses(state, seen), "last": seen.losses[:1].nan_to_num()}


class FirstLossTwice(Steady):
    """One objective has a place of its own."""

    def found(self, seen: StepLosses) -> Tensor:
        found = super().found(seen).clone()
        found[0] *= 2
        return found


class AllLossesAlike(Steady):
    """Lowers losses that nobody asked for."""

    def found(self, seen: StepLosses) -> Tensor:
        return (seen.pairs > 0).double()


class OfLevels(Combiner):
    """Reads the rewards of the chosen responses, and does not say so."""

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled"})
    weighs_judges: ClassVar[bool] = True

    def check(self, preference: Preference) -> None:
        if preference.kind != "weights":
            raise PreferenceError(f"weights are wanted, not {preference.kind}")

    def needs(self, preference: Preference) -> frozenset[str]:
        return frozenset() if 1.0 in preference.values.values() else frozenset({"margins"})

    def pair_terms(self, batch: Batch) -> PairTerms:
        if batch.rewards is None:
            batch = replace(batch, rewards=torch.zeros_like(batch.preference))
            assert batch.rewards is not None
        own, judge = pair_preference(batch), batch.pair_objective[:, None]
        others = own.scatter(1, judge, 0.0) * (own.gather(1, judge) > 0)
        values = (batch.rewards[batch.pairs[:, 0]].where(others > 0, 0.0) * others).sum(1)
        return PairTerms(torch.ones_like(values), values, own.gather(1, judge)[:, 0])


class MixedLabels(Combiner):
    """Right: a soft label from all judges."""

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled"})
    merges_judges: ClassVar[bool] = True
    weighs_judges: ClassVar[bool] = True

    def check(self, preference: Preference) -> None:
        if preference.kind != "weights":
            raise PreferenceError(f"weights are wanted, not {preference.kind}")

    def pair_terms(self, batch: Batch) -> PairTerms:
        assert batch.preferred is not None
        weights, one = pair_preference(batch), torch.ones(len(batch.pairs), dtype=batch.logps.dtype)
        first, second = batch.preferred.nan_to_num(0.0), (1 - batch.preferred).nan_to_num(0.0)
        return PairTerms(one, 0 * one, (weights * first).sum(1), reversed=(weights * second).sum(1))


class FirstIsBetter(MixedLabels):
    """Takes the response that stands first for the better one."""

    def pair_terms(self, batch: Batch) -> PairTerms:
        terms = super().pair_terms(batch)
        assert terms.reversed is not None
        return PairTerms(terms.scale, terms.margin, terms.weight + terms.reversed)


class EndlessReversal(MixedLabels):
    """The weight of the other way round is infinite where nobody prefers it."""

    def pair_terms(self, batch: Batch) -> PairTerms:
        terms = super().pair_terms(batch)
        assert terms.reversed is not None
        return PairTerms(terms.scale, terms.margin, terms.weight, reversed=1 / terms.reversed)


class OfAllAndEach(MixedLabels):
    """Says that a pair belongs to one objective's loss, and to all."""

    weighs_losses: ClassVar[bool] = True


WRONG = {
    AgainstTheLoss: "cannot count less than nothing",
    LossesInPlace: "an argument changed during the call",
    NamesOneOnly: "one number for each of concise, harmless, by name",
    LossesAsTensors: "no tensors",
    FirstLossTwice: "none is special by position",
    AllLossesAlike: "no weight to the loss of an objective that has none",
    OfLevels: "declare reads_levels = True",
    FirstIsBetter: "weight and reversed follow from what the judges prefer",
    EndlessReversal: "reversed of pair .* is not finite",
    OfAllAndEach: "belongs to the loss of none",
}
UNUSUAL = (Steady, MixedLabels)

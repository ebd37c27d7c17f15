"""Rules that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moalign.api import Batch, Combiner, PairTerms, Preference, PreferenceError, Round, pair_preference


class Weighted(Combiner):
    """Right: what the others spoil. A pair counts as much as its judge, a scored one once."""

    weighs_judges: ClassVar[bool] = True

    def check(self, preference: Preference) -> None:
        if preference.kind != "weights":
            raise PreferenceError(f"weights are wanted, not {preference.kind}")

    def pair_terms(self, batch: Batch) -> PairTerms:
        preference = pair_preference(batch)
        own = preference.gather(1, batch.pair_objective.clamp(min=0)[:, None]).squeeze(1)
        weight = own.where(batch.pair_objective >= 0, 1.0)
        difference = None if batch.margins is None else self.scalarise(batch.margins, preference)
        return PairTerms(torch.ones_like(own), torch.zeros_like(own), weight, difference)

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return (rewards.masked_fill(preference == 0, 0.0) * preference).sum(-1)


def spoilt(terms: PairTerms, **changed: Tensor) -> PairTerms:
    return PairTerms(**{"scale": terms.scale, "margin": terms.margin, "weight": terms.weight} | changed)


class OneWeightForAll(Weighted):
    """Returns a single weight for the whole batch."""

    def pair_terms(self, batch: Batch) -> PairTerms:
        terms = super().pair_terms(batch)
        return PairTerms(terms.scale, terms.margin, terms.weight.mean(), terms.difference)


class DividesByZero(Weighted):
    """The scale of a pair whose judge has no weight is infinite."""

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled"})

    def pair_terms(self, batch: Batch) -> PairTerms:
        terms = super().pair_terms(batch)
        return spoilt(terms, scale=1 / terms.weight)


class SilentAboutMargins(Weighted):
    """Reads margins and does not ask for them."""

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled"})

    def pair_terms(self, batch: Batch) -> PairTerms:
        assert batch.margins is not None, "no margins"
        others = pair_preference(batch).scatter(1, batch.pair_objective[:, None], 0.0)
        return spoilt(super().pair_terms(batch), margin=self.scalarise(batch.margins, others))


class AsksForMargins(Weighted):
    """Asks for margins that it has no use for."""

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled"})

    def needs(self, preference: Preference) -> frozenset[str]:
        return frozenset({"margins"})

    def pair_terms(self, batch: Batch) -> PairTerms:
        return spoilt(super().pair_terms(batch))


class CountsEveryJudge(Weighted):
    """Says that pairs of judges without weight have weight 0, and lets them count."""

    def pair_terms(self, batch: Batch) -> PairTerms:
        terms = super().pair_terms(batch)
        return PairTerms(terms.scale, terms.margin, terms.weight + 0.5, terms.difference)


class HidesItsJudges(Weighted):
    """Does not say that pairs of judges without weight have weight 0."""

    weighs_judges: ClassVar[bool] = False


class IgnoresTheWanted(Weighted):
    """Gives weight 0 to the pairs of the only wanted objective."""

    def pair_terms(self, batch: Batch) -> PairTerms:
        terms = super().pair_terms(batch)
        weight = terms.weight * (terms.weight < 1)
        return PairTerms(terms.scale, terms.margin, weight, terms.difference)


class NoDifference(Weighted):
    """Accepts scored pairs and has no difference for them."""

    def pair_terms(self, batch: Batch) -> PairTerms:
        return spoilt(super().pair_terms(batch))


class UnknownSpreads(Weighted):
    """0 * NaN is NaN."""

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return (rewards * preference).sum(-1)


class UnknownIsZero(Weighted):
    """Takes 0 for a reward that nobody knows."""

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return (rewards.nan_to_num() * preference).sum(-1)


class OnlyTwoDimensions(Weighted):
    """Knows rewards [N,M] and preferences [M] only."""

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return super().scalarise(rewards, preference) if rewards.dim() < 3 else rewards.sum((-1, -2))


class CentresOverTheBatch(Weighted):
    """Subtracts the mean of all rows."""

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        value = super().scalarise(rewards, preference)
        return value - value.mean() / 2


class SmallerIsBetter(Weighted):
    """Falls where a reward grows."""

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return -super().scalarise(rewards, preference)


class FavoursTheFirst(Weighted):
    """Counts the first objective twice."""

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        known = rewards.masked_fill(preference == 0, 0.0) * preference
        return known.sum(-1) + known[..., 0]


class WritesIntoTheBatch(Weighted):
    """Clamps the strengths in place."""

    def pair_terms(self, batch: Batch) -> PairTerms:
        batch.strength.clamp_(max=1.0)
        return super().pair_terms(batch)


class RefusesByValueError(Weighted):
    """Refuses directions with a ValueError."""

    def check(self, preference: Preference) -> None:
        if preference.kind != "weights":
            raise ValueError("weights are wanted")


class TwoObjectivesOnly(Weighted):
    """Refuses equal weights of three objectives."""

    def check(self, preference: Preference) -> None:
        super().check(preference)
        if len(preference.values) != 2:
            raise PreferenceError("two objectives are wanted")


class UnknownPairs(Weighted):
    """Accepts pairs of a kind that nobody supplies."""

    accepts: ClassVar[frozenset[str]] = frozenset({"ranked"})


class Seeds(Weighted):
    """Seeds torch's global generator."""

    def pair_terms(self, batch: Batch) -> PairTerms:
        torch.manual_seed(1)
        return super().pair_terms(batch)


class Remembers(Weighted):
    """Right, for sampled responses: the weights move by the running means of the rewards, round by round."""

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})

    def init(self, preference: Preference) -> Mapping[str, Any]:
        return {"names": list(preference.values), "means": dict.fromkeys(preference.values, 0.0), "damping": 0.5}

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        kept = (state["means"][name] / 2 for name in seen.objectives)
        moved = [before + mean / 2 for before, mean in zip(kept, seen.rewards.mean(0).tolist(), strict=True)]
        return {**state, "means": dict(zip(seen.objectives, moved, strict=True))}

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        means = rewards.new_tensor([state["means"][name] for name in state["names"]])
        return self.scalarise(rewards, preference * (-state["damping"] * means).sigmoid())


class HalfPrecision(Remembers):
    """Returns float32."""

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return super().signal(rewards, preference, groups, state).float()


class DividesByTheOthers(Remembers):
    """A response that is alone in its group has none."""

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return super().signal(rewards, preference, groups, state) / ((groups[:, None] == groups).sum(1) - 1)


class ShiftsInPlace(Remembers):
    """Centres the rewards that it was given."""

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return super().signal(rewards.sub_(1.0), preference, groups, state)


class WritesIntoTheState(Remembers):
    """Changes the state that it was given."""

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        state["means"].update(super().observe(state, seen)["means"])
        return state


class EndlessFactor(Remembers):
    """Multiplies the advantages by infinity."""

    def multiplier(self, state: Mapping[str, Any]) -> float:
        return float("inf")


class KeepsItsOwnCount(Remembers):
    """Counts the rounds of all candidates in itself."""

    seen_before: ClassVar[list[int]] = []

    def multiplier(self, state: Mapping[str, Any]) -> float:
        self.seen_before.append(1)
        return 1 / len(self.seen_before)


class TensorInTheState(Remembers):
    """Its state holds a tensor."""

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        return {**super().observe(state, seen), "last": seen.rewards.mean()}


class FirstOfTheState(Remembers):
    """Reads its state by the place of the keys."""

    def init(self, preference: Preference) -> Mapping[str, Any]:
        return {"start": 1.0, **super().init(preference), "a": 2.0}

    def multiplier(self, state: Mapping[str, Any]) -> float:
        return float(next(iter(state.values())) == 1.0)


class EarlyBirds(Remembers):
    """Whoever was sampled first gets more."""

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return super().signal(rewards, preference, groups, state) - 0.1 * torch.arange(len(rewards))


class CountsTheFirstTwice(Remembers):
    """One objective has a place of its own."""

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return super().signal(rewards, preference, groups, state) + rewards[:, 0]


class RanksTheWorstFirst(Remembers):
    """Falls where a reward grows."""

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return -super().signal(rewards, preference, groups, state)


class TwoAnswers(Weighted):
    """Doubles for sampled responses what it has for pairs."""

    accepts: ClassVar[frozenset[str]] = frozenset({"scored", "groups"})
    weighs_judges: ClassVar[bool] = False

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return 2 * self.scalarise(rewards, preference)


class EmptyRange(Remembers):
    """Has a meaning for no reward at all."""

    reward_range: ClassVar[tuple[float, float]] = (1.0, 0.0)


class SecretlyRelative(Weighted):
    """Compares each response with the others to its prompt, and says that it compares with none."""

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        value, same = self.scalarise(rewards, preference), (groups[:, None] == groups).double()
        return value - same @ value / same.sum(-1)


WRONG = {
    SecretlyRelative: "declare pointwise = False",
    OneWeightForAll: "a tensor",
    DividesByZero: "scale of pair .* is not finite",
    SilentAboutMargins: 'return frozenset.."margins".. from needs',
    AsksForMargins: "though needs.. asks for margins",
    CountsEveryJudge: "though weighs_judges is True",
    HidesItsJudges: "though weighs_judges is False",
    IgnoresTheWanted: "weight 0 for its own pairs",
    NoDifference: "difference is NoneType",
    UnknownSpreads: "0 . NaN is NaN",
    UnknownIsZero: "a reward that nobody knows",
    OnlyTwoDimensions: r"scalarise \[1, 5, .\], \[2, 1, .\]",
    CentresOverTheBatch: "other values than row by row",
    SmallerIsBetter: "a smaller result",
    FavoursTheFirst: "treat all objectives alike",
    WritesIntoTheBatch: "strength changed during the call",
    RefusesByValueError: "raise PreferenceError",
    TwoObjectivesOnly: "equal weights of any number of objectives",
    UnknownPairs: 'accepts holds one or more of "labelled"',
    Seeds: "global random state of torch",
    HalfPrecision: r"return one float64 for each response: \[9\]",
    DividesByTheOthers: "a signal that is not finite",
    ShiftsInPlace: "an argument changed during the call",
    WritesIntoTheState: "observe, round 0.*\n.*an argument changed during the call",
    EndlessFactor: "return one finite number",
    KeepsItsOwnCount: "another signal or multiplier\n.*functions of their arguments",
    TensorInTheState: "no tensors",
    FirstOfTheState: "the order of its keys",
    EarlyBirds: "never from its place",
    CountsTheFirstTwice: "none is special by position",
    RanksTheWorstFirst: "its signal falls",
    TwoAnswers: "two answers",
    EmptyRange: "the smallest and the largest reward",
}


class Worst(Combiner):
    """Unusual and right: the worst of the weighted rewards counts (Chebyshev), every judgement once, at half the scale.

    Directions have no meaning, and a reward without weight takes no part.
    """

    def check(self, preference: Preference) -> None:
        if preference.kind != "weights":
            raise PreferenceError("the worst reward is told by weights")

    def pair_terms(self, batch: Batch) -> PairTerms:
        preference = pair_preference(batch)
        difference = None
        if batch.rewards is not None:
            values = self.scalarise(batch.rewards, batch.preference)
            difference = values[batch.pairs[:, 0]] - values[batch.pairs[:, 1]]
        half = torch.full_like(preference[:, 0], 0.5)
        return PairTerms(half, torch.zeros_like(half), torch.ones_like(half), difference)

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        rewards, preference = torch.broadcast_tensors(rewards, preference)
        counts = preference != 0
        return (rewards / preference.where(counts, 1.0)).masked_fill(~counts, torch.inf).amin(-1)


class InteriorOnly(Weighted):
    """Unusual and right: refuses weights of 0, since its terms divide by all of them; for scored pairs alone."""

    accepts: ClassVar[frozenset[str]] = frozenset({"scored"})
    weighs_judges: ClassVar[bool] = False

    def check(self, preference: Preference) -> None:
        super().check(preference)
        if 0 in preference.values.values():
            raise PreferenceError("every objective needs a weight above 0")

    def needs(self, preference: Preference) -> frozenset[str]:
        return frozenset({"margins"})

    def scalarise(self, rewards: Tensor, preference: Tensor) -> Tensor:
        return -((-rewards).exp() * preference).sum(-1).log()


UNUSUAL = (Weighted, Worst, InteriorOnly, Remembers)

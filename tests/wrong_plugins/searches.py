"""Searches that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import ClassVar

from moalign.api import Candidate, ConfigError, Outcome, Preference, Search, Space


class Lines(Search):
    """Right: what the others spoil. Points between each two neighbouring objectives; one objective has one point."""

    points: int = 3

    def all(self, space: Space) -> list[Candidate]:
        made = []
        for number in range(self.points):
            share = number / max(1, self.points - 1)
            weights = dict.fromkeys(space.objectives, 0.0)
            weights[space.objectives[0]] = 1 - share
            weights[space.objectives[-1]] += share
            made.append(Candidate(f"p{number}", Preference("weights", weights)))
        return made

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        seen = {outcome.id for outcome in history}
        return [candidate for candidate in self.all(space) if candidate.id not in seen]


class Endless(Lines):
    """Always has one candidate more."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        return [replace(self.all(space)[0], id=f"p{len(history)}")]


class TriesFailuresAgain(Lines):
    """Proposes anew what failed."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        done = {outcome.id for outcome in history if outcome.status == "done"}
        return [candidate for candidate in self.all(space) if candidate.id not in done]


class SameIdTwice(Lines):
    """Two candidates with one id."""

    def all(self, space: Space) -> list[Candidate]:
        return [*super().all(space), super().all(space)[0]]


class CountsCalls(Lines):
    """Remembers how often it was asked."""

    calls: ClassVar[list[int]] = []

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        self.calls.append(1)
        found = super().propose(space, history, rng)
        if space.conditioned:
            return found
        return [replace(each, changes={"train.steps": len(self.calls)}) for each in found]


class DrawsFromTheWorld(Lines):
    """Draws from the global generator instead of its own."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        found = super().propose(space, history, rng)
        random.shuffle(found)
        return found


class SlashInTheId(Lines):
    """Ids that lead into another folder."""

    def all(self, space: Space) -> list[Candidate]:
        return [replace(candidate, id=f"../{candidate.id}") for candidate in super().all(space)]


class WeightsOfTwo(Lines):
    """Weights that add up to 2."""

    def all(self, space: Space) -> list[Candidate]:
        made = []
        for candidate in super().all(space):
            values = {name: 2 * value for name, value in candidate.preference.values.items()}
            made.append(replace(candidate, preference=Preference("weights", values)))
        return made


class LeavesOutZeros(Lines):
    """Weights without the objectives that have none."""

    def all(self, space: Space) -> list[Candidate]:
        made = []
        for candidate in super().all(space):
            values = {name: value for name, value in candidate.preference.values.items() if value}
            made.append(replace(candidate, preference=Preference("weights", values)))
        return made


class WritesIntoTheHistory(Lines):
    """Forgets the scores of what failed, in the history itself."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        for outcome in history:
            outcome.scores.clear()  # type: ignore[attr-defined]
        return super().propose(space, history, rng)


class ParentsInTheMaking(Lines):
    """A parent that is not finished."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        found = super().propose(space, history, rng)
        return [replace(each, parents=() if each is found[0] else (found[0].id,)) for each in found]


class ParentsThatFailed(Lines):
    """The last one of the history as the parent, done or not."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        found = super().propose(space, history, rng)[:1]
        return [replace(each, parents=tuple(outcome.id for outcome in history[-1:])) for each in found]


class UnknownChanges(Lines):
    """Changes what cannot differ between candidates."""

    def all(self, space: Space) -> list[Candidate]:
        return [replace(candidate, changes={"model.path": "elsewhere"}) for candidate in super().all(space)]


class NoSteps(Lines):
    """Changes a key to a value that it cannot have."""

    def all(self, space: Space) -> list[Candidate]:
        return [replace(candidate, changes={"train.steps": 0}) for candidate in super().all(space)]


class ReadsScoresOfFailures(Lines):
    """Looks for a score that failed candidates do not have."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        best = sorted(history, key=lambda outcome: outcome.scores[space.objectives[0]])
        assert len(best) == len(history)
        return super().propose(space, history, rng)


class TakesSkippedForDone(Lines):
    """Looks for scores of all that did not fail."""

    points: int = 5

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        tried = [outcome for outcome in history if outcome.status != "failed"]
        best = max(tried, key=lambda outcome: sum(outcome.scores.values()), default=None)
        assert best is None or min(len(outcome.scores) for outcome in tried) == len(best.scores)
        return super().propose(space, history, rng)


class HopesForMoney(Lines):
    """Proposes anew what did not fit into the budget."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        return super().propose(space, [outcome for outcome in history if outcome.status != "skipped"], rng)

    points: int = 5


class KnowsTheBaseBeforehand(Lines):
    """Compares with the base's scores also before they are measured."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        return super().propose(space, history, rng) if space.base[space.objectives[0]] < 1 else []


class NegativeSeeds(Lines):
    """A seed below 0."""

    def all(self, space: Space) -> list[Candidate]:
        return [replace(candidate, changes={"seed": -1}) for candidate in super().all(space)]


class Blends(Lines):
    """Right: two points that are trained, and then a blend of them, a fifth of it from the second in the upper half."""

    points: int = 2

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        if space.conditioned:
            raise ConfigError("search: one model cannot be blended")
        done = {outcome.id for outcome in history if outcome.status == "done"}
        if missing := super().propose(space, history, rng):
            return missing
        if not done.issuperset({"p0", "p1"}) or any(outcome.id == "blend" for outcome in history):
            return []
        equal = Preference("weights", dict.fromkeys(space.objectives, 1 / len(space.objectives)))
        return [self.blend(Candidate("blend", equal, mixed=True, shares={"p0": 0.9, "p1": (0.0, 0.2)}))]

    def blend(self, candidate: Candidate) -> Candidate:
        return candidate


class StartsTwice(Blends):
    """Trained from a parent and from shares."""

    def blend(self, candidate: Candidate) -> Candidate:
        return replace(candidate, mixed=False, parents=tuple(candidate.shares)[:1])


class BlendsWhatIsNotThere(Blends):
    """Shares of a candidate that nobody knows."""

    def blend(self, candidate: Candidate) -> Candidate:
        return replace(candidate, shares={"p9": 1.0})


class BlendsWithoutEnd(Blends):
    """A share that is infinite."""

    def blend(self, candidate: Candidate) -> Candidate:
        return replace(candidate, shares={"p0": float("inf")})


class KnowsItsOwn(Lines):
    """Takes every id of the history for one of its own."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        every = {candidate.id: candidate for candidate in self.all(space)}
        for outcome in history:
            del every[outcome.id]
        return list(every.values())


class TrainsOneModelAgain(Lines):
    """Wants candidates trained in their own way where there is one model."""

    def all(self, space: Space) -> list[Candidate]:
        return [replace(candidate, changes={"train.steps": 5}) for candidate in super().all(space)]


class BoundsOneModel(Lines):
    """Thresholds where there is one model."""

    def all(self, space: Space) -> list[Candidate]:
        others = space.objectives[1:]
        bounded = Preference("thresholds", dict.fromkeys(others, 0.5))
        more = [Candidate("bounded", bounded)] if space.conditioned and others else []
        return [*super().all(space), *more]


class NothingAtAll(Lines):
    """Has nothing to propose."""

    points: int = 0


class NoneForNothing(Lines):
    """Returns None at its end."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        return super().propose(space, history, rng) or None  # type: ignore[return-value]


class RefusesEverything(Lines):
    """Refuses every space."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        raise ConfigError("search.points: not this space")


WRONG = {
    Endless: "the search still proposes more",
    TriesFailuresAgain: "which the history has",
    SameIdTwice: r"\['p0'\] twice",
    CountsCalls: "a function of space, history and rng alone",
    DrawsFromTheWorld: "global random state of random",
    SlashInTheId: "cannot name a folder",
    WeightsOfTwo: "the weights add up to 2",
    LeavesOutZeros: "a number for every objective",
    WritesIntoTheHistory: "history or the space was changed",
    ParentsInTheMaking: "only one that the history has as done",
    ParentsThatFailed: "only one that the history has as done",
    UnknownChanges: "changes with 'model.path'",
    NoSteps: "greater than or equal to 1",
    ReadsScoresOfFailures: "KeyError(.|\n)*candidates fail",
    TakesSkippedForDone: "AssertionError",
    HopesForMoney: "which the history has",
    KnowsTheBaseBeforehand: "KeyError",
    NegativeSeeds: "a seed is a whole number",
    StartsTwice: "give parents or shares",
    BlendsWhatIsNotThere: "mix only from candidates that the history has as done",
    BlendsWithoutEnd: "a finite number",
    KnowsItsOwn: "only-concise",
    TrainsOneModelAgain: "one model is only asked there",
    BoundsOneModel: "thresholds, and one model knows none",
    NothingAtAll: "no candidate at all",
    NoneForNothing: "TypeError",
    RefusesEverything: "every one is refused",
}


class Refining(Search):
    """Unusual and right: one at a time, for two objectives; each is trained from the best so far, with fewer steps.

    Which part is halved next depends on the scores and on chance, and it ends early where nothing succeeds.
    """

    budget: int = 9

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        if len(space.objectives) != 2 or space.conditioned:
            raise ConfigError("search: two objectives are wanted, and candidates")
        first, second = space.objectives
        tried = [outcome for outcome in history if outcome.id.startswith("half-")]
        done = [outcome for outcome in tried if outcome.status == "done"]
        if len(tried) >= self.budget or (len(tried) >= 3 and not done):
            return []
        share = [rng.random() for _ in range(len(tried) + 1)][-1]
        best = max(done, key=lambda outcome: sum(outcome.scores.values()), default=None)
        return [
            Candidate(
                f"half-{len(tried):02d}",
                Preference("weights", {first: share, second: 1 - share}),
                parents=() if best is None else (best.id,),
                changes={} if best is None else {"train.steps": max(1, space.steps // 4), "loss.beta": 0.2},
            )
        ]


class Directions(Search):
    """Unusual and right: directions instead of weights, and a mix at the end, as a tuple."""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> Sequence[Candidate]:
        seen = {outcome.id for outcome in history}
        alone = [
            Candidate(f"only.{name}", Preference("direction", {each: float(each == name) for each in space.objectives}))
            for name in space.objectives
        ]
        missing = [candidate for candidate in alone if candidate.id not in seen]
        equal = Preference("weights", dict.fromkeys(space.objectives, 1 / len(space.objectives)))
        middle = Candidate("middle", equal, mixed=True)
        return tuple(missing or ([middle] if middle.id not in seen else []))


UNUSUAL = (Lines, Blends, Refining, Directions)

"""Whether a search keeps to the contract of ``moalign.api.Search``: driven with made-up outcomes to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import product
from math import isfinite, sqrt
from random import Random
from typing import Any, Literal

from pydantic import ValidationError

from moalign import preference
from moalign.api import Candidate, Outcome, Preference, PreferenceError, Search, Space, UserError
from moalign.config import LoraSettings, TrainSettings
from moalign.storage import safe_name
from moalign.sweeps.changes import CHANGEABLE
from moalign.testing.review import Review, described, run, short

NAMES = ("concise", "harmless", "helpful", "truthful", "fluent", "polite", "terse", "witty")
STRANGER = "only-concise"
FATES = (
    "all succeed",
    "every third fails",
    "all fail",
    "one succeeded that nobody proposed",
    "the budget ends after three",
)
SEEDS = 2**32


def check_search(
    plugin: Search,
    *,
    objectives: int = 4,
    steps: int = 100,
    limit: int = 300,
    seed: int = 0,
    exempt: Collection[str] = (),
) -> None:
    """Drive a search for 1 to ``objectives`` (at most 8) objectives, with and without preferences of the user's.

    Where there are such preferences, there are also a price of KL, a reference point of the user's, a budget, and four
    candidates in one pass; and once more with one model that is only asked (``Space.conditioned``). It is asked once
    before the base is measured, and then with its scores.

    A UserError (ConfigError, PreferenceError) in answer to a space is accepted, but not for all of them. ``limit``:
    candidates after which a search counts as endless. ``exempt``: names of checks to leave out. Raises
    ConformanceError.
    """
    review = Review("search", plugin)
    spaces = list(_spaces(min(objectives, len(NAMES)), steps))
    run(CHECKS, Trial(review, plugin, spaces, limit, seed), exempt)


@dataclass
class Trial:
    review: Review
    plugin: Search
    spaces: list[Space]
    limit: int
    seed: int
    refusals: dict[int, UserError] = field(default_factory=dict)
    copies: dict[int, tuple[Outcome, Outcome]] = field(default_factory=dict)

    def propose(self, tried: str, space: Space, history: Sequence[Outcome], measured: bool = True) -> list[Candidate]:
        """Watched: the history and the space must stay what they are. ``measured``: the base is, by now."""
        space = _by_now(space, history) if measured else space
        given, given_space = self._copies_of(history), deepcopy(space)
        change = "take every history: candidates fail, and what is in it need not be what was proposed"
        rng = Random(self.seed)
        found = self.review.call(tried, change, lambda: list(self.plugin.propose(given_space, given, rng)))
        same = given == tuple(history) and given_space == space
        self.review.require(same, tried, "the history or the space was changed", "copy what is to be changed")
        return found

    def _copies_of(self, history: Sequence[Outcome]) -> tuple[Outcome, ...]:
        """One copy of each outcome serves all calls: a search that writes into it is caught the first time."""
        for outcome in history:
            self.copies.setdefault(id(outcome), (outcome, deepcopy(outcome)))
        return tuple(self.copies[id(outcome)][1] for outcome in history)

    def drives(self) -> Iterator[tuple[str, Space, str]]:
        """All ways to drive the search that it does not refuse."""
        for index, space in enumerate(self.spaces):
            if index not in self.refusals:
                for fate in FATES:
                    one = ", one model" if space.conditioned else ""
                    yield f"{len(space.objectives)} objectives{one}, {fate}", space, fate

    def rounds(self, name: str, space: Space, fate: str) -> Iterator[tuple[tuple[Outcome, ...], list[Candidate]]]:
        """History and proposal of each round, until the search is over."""
        history: tuple[Outcome, ...] = ()
        if fate == "one succeeded that nobody proposed":
            alone = {each: float(each == space.objectives[0]) for each in space.objectives}
            history = (_done(Candidate(STRANGER, Preference("weights", alone)), space),)
        for number in range(self.limit + 1):
            proposed = self.propose(f"{name}: propose() in round {number}", space, history)
            yield history, proposed
            if not proposed:
                return
            known = {outcome.id for outcome in history}
            if known.issuperset(candidate.id for candidate in proposed):
                return  # a check of its own
            count = len(history)
            history += tuple(_outcome(fate, count + at, each, space) for at, each in enumerate(proposed))
            if len(history) > self.limit:
                break
        self.review.fail(
            f"{name}, {self.limit} candidates long",
            "the search still proposes more",
            "return [] once the budget is spent, failed candidates included, or raise `limit` of this check",
        )


def some_space_is_taken(t: Trial) -> None:
    """A space may be refused with a UserError before anything is proposed, but not every space."""
    for index, space in enumerate(t.spaces):
        tried = f"propose() for {len(space.objectives)} objectives and preferences {sorted(space.preferences)}"
        try:
            first = t.propose(tried, space, (), measured=False)
        except UserError as error:
            t.refusals[index] = error
            continue
        change = "propose something, or raise ConfigError saying what the space lacks"
        t.review.require(bool(first), tried, "no candidate at all", change)
    if len(t.refusals) == len(t.spaces):
        last = t.refusals[len(t.spaces) - 1]
        tried = f"spaces of 1 to {len(t.spaces[-1].objectives)} objectives, with and without preferences"
        t.review.fail(tried, f"every one is refused: {described(last)}", "take at least one of them", last)


def propose_is_pure(t: Trial) -> None:
    """The same arguments give the same candidates, whatever was asked before."""
    for name, space, fate in t.drives():
        rounds = list(_ending(t, name, space, fate))
        for history, proposed in reversed(rounds):
            tried = f"{name}: propose() again, with a history of {len(history)} and the same seed"
            change = (
                "make propose a function of space, history and rng alone: a resumed run replays it. State and the "
                "clock do not survive; the generator starts from the same seed at every call"
            )
            again = t.propose(tried, space, history)
            t.review.require(len(again) == len(proposed), tried, f"{_ids(again)}, before {_ids(proposed)}", change)
            for now, before in zip(again, proposed, strict=True):
                t.review.require(now == before, tried, f"{now}, before {before}", change)


def candidates_are_sound(t: Trial) -> None:
    """Ids, preferences, parents and changes of all that is proposed."""
    for name, space, fate in t.drives():
        for history, proposed in t.rounds(name, space, fate):
            for candidate in proposed:
                tried = f"{name}: the candidates proposed after {len(history)} outcomes"
                change = "return moalign.api.Candidate"
                t.review.require(isinstance(candidate, Candidate), tried, short(candidate), change)
            for candidate in proposed:
                tried = f"{name}: the candidate {short(candidate.id)}"
                change = (
                    "use letters, digits and . _ = - in ids, a letter or digit first, at most 128: they name folders"
                )
                t.review.require(safe_name(candidate.id), tried, "an id that cannot name a folder", change)
                _check_preference(t, tried, candidate, space)
                _check_parents(t, tried, candidate, history)
                _check_changes(t, tried, candidate)
                _check_shares(t, tried, candidate, history)
                if space.conditioned:
                    _check_question(t, tried, candidate)


def nothing_is_proposed_twice(t: Trial) -> None:
    """Ids are unique, and none is in the history, also where that ends in the middle of a proposal."""
    for name, space, fate in t.drives():
        for history, proposed in t.rounds(name, space, fate):
            tried, ids = f"{name}: the ids proposed after {len(history)} outcomes", _ids(proposed)
            repeated = sorted({each for each in ids if ids.count(each) > 1})
            t.review.require(not repeated, tried, f"{repeated} twice", "give every candidate an id of its own")
            change = "leave out what is in the history, done, failed or skipped: an outcome stands"
            known = sorted({outcome.id for outcome in history}.intersection(ids))
            t.review.require(not known, tried, f"{known}, which the history has", change)
            if proposed:
                first = (*history, _outcome(fate, len(history), proposed[0], space))
                tried = f"{name}: a history of {len(first)}, which ends in the middle of a proposal"
                more = _ids(t.propose(tried, space, first))
                t.review.require(proposed[0].id not in more, tried, f"{proposed[0].id} again after it ended", change)


def the_search_ends(t: Trial) -> None:
    """Within ``limit`` candidates, whatever becomes of them."""
    for name, space, fate in t.drives():
        for _ in t.rounds(name, space, fate):
            pass


CHECKS: tuple[Callable[[Trial], None], ...] = (
    some_space_is_taken,
    the_search_ends,
    nothing_is_proposed_twice,
    candidates_are_sound,
    propose_is_pure,
)


def _check_preference(t: Trial, tried: str, candidate: Candidate, space: Space) -> None:
    found = candidate.preference
    change = "give weights that are not negative and add up to 1, a direction of length 1, or thresholds"
    t.review.require(isinstance(found, Preference), tried, f"the preference {short(found)}", change)
    try:
        expected = preference.parse(found, space.objectives)
    except PreferenceError as error:
        t.review.fail(tried, described(error), change, error)
    same = list(found.values.items()) == list(expected.values.items())
    change = "give a number for every objective, in the order of space.objectives"
    t.review.require(same, tried, f"the preference {short(dict(found.values))}", change)


def _check_parents(t: Trial, tried: str, candidate: Candidate, history: Sequence[Outcome]) -> None:
    done = {outcome.id for outcome in history if outcome.status == "done"}
    change = "name at most one parent, and only one that the history has as done"
    good = isinstance(candidate.parents, tuple) and len(candidate.parents) <= 1 and done.issuperset(candidate.parents)
    t.review.require(good, tried, f"the parents {short(candidate.parents)}", change)


def _check_changes(t: Trial, tried: str, candidate: Candidate) -> None:
    for key, value in candidate.changes.items():
        got, known = f"changes with {key!r}: {short(value)}", key in CHANGEABLE or key.startswith("loss.")
        t.review.require(known, tried, got, f'use "loss.<option>" or one of {", ".join(sorted(CHANGEABLE))}')
        change = "do not change the rank or alpha of a candidate with a parent: it has the parent's"
        t.review.require(not (candidate.parents and key.startswith("model.lora.")), tried, got, change)
        try:
            json.dumps(value, allow_nan=False)
            _settings(key, value)
        except (TypeError, ValueError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else described(error)
            t.review.fail(tried, f"{got}, {reason}", "give a value that the key takes in a configuration", error)


def _check_shares(t: Trial, tried: str, candidate: Candidate, history: Sequence[Outcome]) -> None:
    if not candidate.shares:
        return
    got = f"the shares {short(dict(candidate.shares))}"
    change = "give parents or shares: it starts from an adapter or from a mix of several"
    t.review.require(not candidate.parents, tried, f"{got}, and the parents {candidate.parents}", change)
    done = {outcome.id for outcome in history if outcome.status == "done"}
    change = "mix only from candidates that the history has as done"
    t.review.require(done.issuperset(candidate.shares), tried, got, change)
    numbers = [share if isinstance(share, tuple) else (share,) for share in candidate.shares.values()]
    sound = all(each and all(isinstance(one, int | float) and isfinite(one) for one in each) for each in numbers)
    t.review.require(sound, tried, got, "give each a finite number, or a tuple of them for blocks of layers")


def _check_question(t: Trial, tried: str, candidate: Candidate) -> None:
    change = "propose preferences alone where space.conditioned, or raise ConfigError before anything is trained"
    got = {name: getattr(candidate, name) for name in ("parents", "shares", "changes") if getattr(candidate, name)}
    t.review.require(not got, tried, f"{short(got)}, and one model is only asked there", change)
    kind = candidate.preference.kind
    t.review.require(kind != "thresholds", tried, "thresholds, and one model knows none", change)


def _settings(key: str, value: Any) -> None:
    if key == "seed" and not (isinstance(value, int) and 0 <= value < SEEDS):
        raise ValueError("a seed is a whole number from 0 to 2^32 - 1")
    section, _, name = key.rpartition(".")
    if section == "train":
        TrainSettings.model_validate({name: value})
    elif section == "model.lora":
        LoraSettings.model_validate({name: value})


def _spaces(objectives: int, steps: int) -> Iterator[Space]:
    """Without and with named preferences, with those also for one model, for every number of objectives."""
    for count, named in product(range(1, objectives + 1), (False, True)):
        names = NAMES[:count]
        equal = Preference("weights", dict.fromkeys(names, 1 / count), "balanced")
        alone = Preference("weights", {name: float(name == names[-1]) for name in names}, "single-minded")
        preferences: Mapping[str, Preference] = {"balanced": equal, "single-minded": alone} if named else {}
        if named:
            point = dict.fromkeys(names, 0.05)
            full = Space(names, preferences, steps, 4, reference_point=point, kl_price=0.05, affordable=6.0, seed=7)
            yield full
            yield replace(full, conditioned=True)
        else:
            yield Space(names, preferences, steps)


def _by_now(space: Space, history: Sequence[Outcome]) -> Space:
    """What a run knows once the base is measured, and so many candidates were trained."""
    base = dict.fromkeys(space.objectives, 0.1)
    spent = sum(outcome.status == "done" for outcome in history)
    left = None if space.affordable is None else max(0.0, space.affordable - spent)
    return replace(space, base=base, reference_point=space.reference_point or base, affordable=left)


def _ending(t: Trial, name: str, space: Space, fate: str) -> Iterator[tuple[tuple[Outcome, ...], list[Candidate]]]:
    """The first rounds; that there is a last one is a check of its own."""
    for number, each in enumerate(t.rounds(name, space, fate)):
        yield each
        if number == 8:
            return


def _outcome(fate: str, number: int, candidate: Candidate, space: Space) -> Outcome:
    if fate == "all fail" or (fate == "every third fails" and number % 3 == 1):
        return _without_scores(candidate, space, "failed")
    if fate == "the budget ends after three" and number >= 3:
        return _without_scores(candidate, space, "skipped")
    return _done(candidate, space)


def _kind(candidate: Candidate, space: Space) -> Literal["trained", "mixed", "conditioned"]:
    return "conditioned" if space.conditioned else candidate.kind


def _without_scores(candidate: Candidate, space: Space, status: Literal["failed", "skipped"]) -> Outcome:
    kind, changes = _kind(candidate, space), candidate.changes
    return Outcome(candidate.id, status, candidate.preference, error="made up", kind=kind, changes=changes)


def _done(candidate: Candidate, space: Space) -> Outcome:
    """Scores on a concave front, the unit sphere; what is bounded lies at its bound."""
    values, objectives = candidate.preference.values, space.objectives
    if candidate.preference.kind == "thresholds":
        left = sqrt(max(1 - sum(value**2 for value in values.values()), 0.0) / (len(objectives) - len(values)))
        scores = {name: values.get(name, left) for name in objectives}
    else:
        scores = {name: sqrt(max(value, 0.0)) for name, value in values.items()}
    return Outcome(
        candidate.id,
        "done",
        candidate.preference,
        scores=scores,
        stderr=dict.fromkeys(scores, 0.01),
        kl=0.5,
        tokens=1000,
        kind=_kind(candidate, space),
        parents=dict.fromkeys(candidate.parents, 1.0),
        changes=candidate.changes,
    )


def _ids(candidates: Sequence[Candidate]) -> list[str]:
    return [getattr(candidate, "id", repr(candidate)) for candidate in candidates]

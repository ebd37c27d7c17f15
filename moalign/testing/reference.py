"""Whether a reference keeps to the contract of ``moalign.api.Reference``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from random import Random

from moalign.api import ConfigError, Move, Progress, Reference
from moalign.testing.review import Review, run, short
from moalign.testing.states import State, begun, check_state, through_json

ROUND = 7  # steps


def check_reference(plugin: Reference, *, steps: int = 210, seed: int = 0, exempt: Collection[str] = ()) -> None:
    """Check a reference on made-up trainings of ``steps`` steps, with rounds of sampled responses and without.

    ``exempt``: names of checks to leave out. Raises ConformanceError.
    """
    run(CHECKS, Trial(Review("reference", plugin), plugin, steps, seed), exempt)


Course = list["Move | None"]


@dataclass(frozen=True)
class Trial:
    review: Review
    plugin: Reference
    steps: int
    seed: int

    def worlds(self) -> Iterator[tuple[str, bool]]:
        """With and without rounds, as far as it says that it works there."""
        for tried, rounds in (("a training with rounds", True), ("a training without rounds", False)):
            try:
                self.review.call(f"check(rounds={rounds})", "raise ConfigError, or nothing", self.plugin.check, rounds)
            except ConfigError:
                continue
            yield tried, rounds

    def looks(self, rounds: bool) -> Iterator[Progress]:
        for step in range(0, self.steps, ROUND if rounds else 1):
            yield Progress(step, step // ROUND if rounds else None)

    def start(self) -> State:
        return begun(self.review, self.plugin.init)

    def course(self, tried: str, rounds: bool, distance: float | None = None, stored: bool = False) -> Course:
        """The moves of a whole training. ``distance``: of the policy at every look; None: drawn, and larger and larger.
        ``stored``: the state goes through JSON between any two."""
        rng, state, moves = Random(self.seed), self.start(), []
        for at in self.looks(rounds):
            drawn = rng.random() * at.step / 4 if distance is None else distance
            move, state = self.move(tried, at, state, drawn)
            moves.append(move)
            state = through_json(state) if stored else state
        return moves

    def move(self, tried: str, at: Progress, state: State, distance: float) -> tuple[Move | None, State]:
        """Checked for kind, finiteness and state, with the state watched."""
        given, where = deepcopy(dict(state)), f"{tried}, step {at.step}"
        told = self.review.answer(where, "return True or False from measures", self.plugin.measures, at, given)
        self.review.require(isinstance(told, bool), where, short(told), "return True or False from measures")
        if told:
            at = Progress(at.step, at.round, distance, distance / 2)
        found = self.review.answer(where, "moves must take any step", self.plugin.moves, at, given)
        change = "make a new state; write nothing into the one that was handed over"
        self.review.require(given == dict(state), where, "the state changed during the call", change)
        change = "return two things: a moalign.api.Move, or None where it stays, and the state from here on"
        self.review.require(isinstance(found, tuple) and len(found) == 2, where, short(found), change)
        move, after = found
        self.review.require(move is None or isinstance(move, Move), where, short(move), change)
        finite = move is None or (_finite(move.policy) and _finite(move.reference))
        self.review.require(finite, where, short(move), "return finite numbers in a Move")
        check_state(self.review, where, after)
        return move, after


def declarations_are_known(t: Trial) -> None:
    """``fixed`` is said, adapters have finite shares, and the rank is one."""
    fixed = t.plugin.fixed
    t.review.require(isinstance(fixed, bool), "reading fixed", short(fixed), "declare fixed as True or False")
    found = t.review.answer("adapters()", "return numbers by folder", t.plugin.adapters)
    good = isinstance(found, Mapping) and all(isinstance(path, str) and _finite(c) for path, c in found.items())
    t.review.require(good, "adapters()", short(found), "return finite numbers by folder; an empty mapping for the base")
    rank = t.review.answer("largest_rank()", "return a rank, or None", t.plugin.largest_rank)
    good = rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1)
    t.review.require(good, "largest_rank()", short(rank), "return 1 or more, or None where ranks add up")


def some_training_is_taken(t: Trial) -> None:
    """Options may be refused with ConfigError for trainings with rounds, or without, but not for both."""
    change = "accept trainings with rounds of sampled responses, or without them, or both"
    t.review.require(any(True for _ in t.worlds()), "check(True), check(False)", "ConfigError for both", change)


def moves_are_sound(t: Trial) -> None:
    """From the first step to the last; where it is not ``fixed``."""
    for tried, rounds in () if t.plugin.fixed else t.worlds():
        t.course(tried, rounds)


def state_is_all_it_remembers(t: Trial) -> None:
    """The same training twice, the second time with a state that went through JSON."""
    for tried, rounds in () if t.plugin.fixed else t.worlds():
        same = t.course(tried, rounds) == t.course(tried, rounds, stored=True)
        change = "keep what is remembered in the state that is returned, never in the plugin; draw nothing at random"
        t.review.require(same, f"{tried}, twice", "other moves the second time", change)


def what_is_measured_is_used(t: Trial) -> None:
    """The distance is asked for only where it changes something: it costs passes of both policies."""
    for tried, rounds in () if t.plugin.fixed else t.worlds():
        if not _measures(t, tried, rounds):
            continue
        courses = [t.course(tried, rounds, distance) for distance in (0.0, 1e-3, 1.0, 1e3, 1e6)]
        change = "return False from measures: the policies are run for it"
        differ = any(course != courses[0] for course in courses)
        t.review.require(differ, f"{tried}, with other distances", "the same moves, though measures says True", change)


def fixed_is_honest(t: Trial) -> None:
    """What moves at some step is not ``fixed``, and what never does, is: then its log-probabilities are kept."""
    if t.plugin.fixed:
        own = type(t.plugin).moves is not Reference.moves
        change = "leave out moves, which is never asked, or do not declare fixed"
        t.review.require(not own, "reading fixed", "True, and a method moves", change)
        return
    for tried, rounds in t.worlds():
        courses = [*t.course(tried, rounds), *t.course(tried, rounds, 1e6)]
        change = "declare fixed = True: the log-probabilities of what never moves are computed once"
        t.review.require(any(courses), tried, "no move at all", change)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    declarations_are_known,
    some_training_is_taken,
    moves_are_sound,
    state_is_all_it_remembers,
    what_is_measured_is_used,
    fixed_is_honest,
)


def _measures(t: Trial, tried: str, rounds: bool) -> bool:
    """Whether it asks for the distance at any look of a training in which it is far away."""
    state = t.start()
    for at in t.looks(rounds):
        if t.plugin.measures(at, state):
            return True
        _, state = t.move(tried, at, state, 1e6)
    return False


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

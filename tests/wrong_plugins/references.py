"""References that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import PrivateAttr

from moalign.api import ConfigError, Move, Progress, Reference

Result = tuple[Move | None, Mapping[str, Any]]


class Yearly(Reference):
    """Right: what the others spoil. The policy of every fifth look."""

    def init(self) -> Mapping[str, Any]:
        return {"looks": 0}

    def moves(self, at: Progress, state: Mapping[str, Any]) -> Result:
        return Move() if state["looks"] % 5 == 0 else None, {"looks": state["looks"] + 1}


class Restless(Yearly):
    """Right: it moves away from the policy."""

    def moves(self, at: Progress, state: Mapping[str, Any]) -> Result:
        return Move(policy=-0.1, reference=1.2), state


class OnlyRounds(Yearly):
    """Right: it takes trainings with rounds alone."""

    def check(self, rounds: bool) -> None:
        if not rounds:
            raise ConfigError("add rollouts")


class SaysMaybe(Yearly):
    """Declares something that is not True or False."""

    fixed: ClassVar[Any] = "maybe"


class OfNoRank(Yearly):
    """Compresses to no rank at all."""

    def largest_rank(self) -> int:
        return 0


class NamesNoShare(Yearly):
    """Begins with an adapter of which it does not say how much."""

    def adapters(self) -> Mapping[str, Any]:
        return {"runs/a": None}


class TakesNothing(Yearly):
    """Refuses every training."""

    def check(self, rounds: bool) -> None:
        raise ConfigError("not today")


class OnlyMoves(Yearly):
    """Forgets to return the state."""

    def moves(self, at: Progress, state: Mapping[str, Any]) -> Any:
        return Move()


class Explodes(Yearly):
    """Moves by what is not finite."""

    def moves(self, at: Progress, state: Mapping[str, Any]) -> Result:
        return Move(policy=float("inf")), state


class WritesIntoTheState(Yearly):
    """Counts in the state that it was handed."""

    def moves(self, at: Progress, state: Any) -> Result:
        state["looks"] += 1
        return Move(), state


class KeepsASet(Yearly):
    """Has a state that JSON does not hold."""

    def init(self) -> Mapping[str, Any]:
        return {"looks": {1, 2}}


class Remembers(Yearly):
    """Counts in itself."""

    _looks: list[int] = PrivateAttr(default_factory=list)

    def moves(self, at: Progress, state: Mapping[str, Any]) -> Result:
        self._looks.append(at.step)
        return Move() if len(self._looks) % 4 == 0 else None, state


class MeasuresForNothing(Yearly):
    """Asks how far the policy is, and does not look."""

    def measures(self, at: Progress, state: Mapping[str, Any]) -> bool:
        return True


class NeverMoves(Yearly):
    """Stays, and does not say so."""

    def moves(self, at: Progress, state: Mapping[str, Any]) -> Result:
        return None, state


class FixedAndMoving(Yearly):
    """Says that it is fixed, and how it moves."""

    fixed: ClassVar[bool] = True


WRONG = {
    SaysMaybe: "declare fixed as True or False",
    OfNoRank: "return 1 or more",
    NamesNoShare: "return finite numbers by folder",
    TakesNothing: "accept trainings with rounds",
    OnlyMoves: "return two things",
    Explodes: "return finite numbers in a Move",
    WritesIntoTheState: "write nothing into the one",
    KeepsASet: "keep as state a mapping that JSON can hold",
    Remembers: "never in the plugin",
    MeasuresForNothing: "return False from measures",
    NeverMoves: "declare fixed = True",
    FixedAndMoving: "leave out moves",
}
UNUSUAL = [Yearly, Restless, OnlyRounds]

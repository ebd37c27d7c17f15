"""Conditioners that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr

from moalign.api import AdapterShape, Conditioner, Preference


class Said(Conditioner):
    """Right: what those that write text spoil."""

    def text(self, preference: Preference) -> Any:
        return ", ".join(f"{name} {round(100 * value)}" for name, value in preference.values.items()) + "\n"


class ByMail(Said):
    """Takes a way that there is not."""

    by: ClassVar[Any] = "mail"


class Numbers(Said):
    """Draws numbers that are no Preference."""

    def draw(self, objectives: tuple[str, ...], rng: random.Random) -> Any:
        return [rng.random() for _ in objectives]


class NotNormalised(Said):
    """Draws weights whose sum is anything."""

    def draw(self, objectives: tuple[str, ...], rng: random.Random) -> Preference:
        return Preference("weights", {name: rng.random() for name in objectives})


class Alphabetical(Said):
    """Sorts the objectives."""

    def draw(self, objectives: tuple[str, ...], rng: random.Random) -> Preference:
        return super().draw(tuple(sorted(objectives)), rng)


class Bounds(Said):
    """Draws thresholds, which are no numbers of all objectives."""

    def draw(self, objectives: tuple[str, ...], rng: random.Random) -> Preference:
        return Preference("thresholds", {name: rng.random() for name in objectives})


class TwoAtMost(Said):
    """Cannot draw for more than two objectives, and does not say so with `angles`."""

    def draw(self, objectives: tuple[str, ...], rng: random.Random) -> Preference:
        first, second = objectives
        weight = rng.random()
        return Preference("weights", {first: weight, second: 1 - weight})


class OfTheWorld(Said):
    """Draws from Python's own generator."""

    def draw(self, objectives: tuple[str, ...], rng: random.Random) -> Preference:
        return super().draw(objectives, random)  # type: ignore[arg-type]


class InTurn(Said):
    """Draws each objective alone, in turn."""

    _count: list[int] = PrivateAttr(default_factory=list)

    def draw(self, objectives: tuple[str, ...], rng: random.Random) -> Preference:
        self._count.append(0)
        chosen = len(self._count) % 7 % len(objectives)
        return Preference("weights", {name: float(place == chosen) for place, name in enumerate(objectives)})


class AlwaysEqual(Said):
    """Draws equal weights each time."""

    def draw(self, objectives: tuple[str, ...], rng: random.Random) -> Preference:
        return Preference("weights", dict.fromkeys(objectives, 1 / len(objectives)))


class TellsNothing(Said):
    """Says the same of all rewards."""

    @property
    def tells_rewards(self) -> bool:
        return True

    def text_of_rewards(self, rewards: Mapping[str, float]) -> Any:
        return f"{', '.join(rewards)}\n"


class TellsOfPositiveOnes(TellsNothing):
    """Takes the logarithm of rewards."""

    def text_of_rewards(self, rewards: Mapping[str, float]) -> Any:
        return f"{sum(map(math.log, rewards.values()))}\n"


class TellsByChance(TellsNothing):
    """Numbers what it says."""

    _count: list[int] = PrivateAttr(default_factory=list)

    def text_of_rewards(self, rewards: Mapping[str, float]) -> Any:
        self._count.append(0)
        return f"{len(self._count)}: {sum(rewards.values())}\n"


class LearnedText(Said):
    """Has parameters, though it writes text."""

    def parameters(self, shape: AdapterShape, generator: torch.Generator) -> Mapping[str, Any]:
        return {"soft": torch.zeros(4)}


class NoText(Said):
    """Writes nothing."""

    def text(self, preference: Preference) -> Any:
        return " "


class Listed(Said):
    """Writes a list."""

    def text(self, preference: Preference) -> Any:
        return [super().text(preference)]


class Paraphrases(Said):
    """Says it another way each time."""

    _count: list[int] = PrivateAttr(default_factory=list)

    def text(self, preference: Preference) -> Any:
        self._count.append(0)
        return super().text(preference) + "!" * (len(self._count) % 2)


class CallsByName(Said):
    """Says the name that a preference has."""

    def text(self, preference: Preference) -> Any:
        return f"{preference.name or ''} {super().text(preference)}"


class Empties(Said):
    """Takes what it says out of the preference."""

    def text(self, preference: Preference) -> Any:
        said = super().text(preference)
        dict.clear(preference.values)  # type: ignore[arg-type]
        return said


class SaysNoNumbers(Said):
    """Names the objectives, and not how much of each."""

    def text(self, preference: Preference) -> Any:
        return f"Be {' and '.join(preference.values)}.\n"


WRONG = {
    ByMail: "got:    'mail'",
    Numbers: r"got:    \[0\.",
    NotNormalised: "sum 1, to 1e-06",
    Alphabetical: r"\['harmless', 'helpful'\](.|\n)*in the order helpful, harmless",
    Bounds: "kind='thresholds'",
    TwoAtMost: "over 3 objectives(.|\n)*too many values",
    OfTheWorld: "global random state of random",
    InTurn: "other preferences the second time",
    AlwaysEqual: "the same preference each time",
    LearnedText: r"\['soft'\], though `by` is \"text\"",
    NoText: "got:    ' '",
    Listed: r"got:    \['helpful",
    Paraphrases: "another text the second time",
    CallsByName: "with a name",
    Empties: "the preference changed during the call",
    SaysNoNumbers: "the same text, 'Be helpful and harmless",
    TellsNothing: "the same text, 'helpful, harmless",
    TellsOfPositiveOnes: "rewards 0, 0(.|\n)*ValueError: ",
    TellsByChance: "the same rewards twice",
}


class Compass(Said):
    """Unusual and right: directions of two objectives, some of them away from the second."""

    angles: tuple[float, float] | None = (-45.0, 45.0)

    def text(self, preference: Preference) -> str:
        first, second = preference.values.values()
        return f"Heading {round(math.degrees(math.atan2(second, first)))}. "


class Told(Said):
    """Unusual and right: tells a response's rewards, and asks for those that suit the preference."""

    @property
    def tells_rewards(self) -> bool:
        return True

    def text_of_rewards(self, rewards: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {round(100 * value)}" for name, value in rewards.items()) + "\n"


UNUSUAL = (Said, Compass, Told)

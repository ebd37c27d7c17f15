"""Conditioners that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from moalign.api import AdapterShape, Conditioner, ConfigError, Preference


class Said(Conditioner):
    """Right: what those that write text spoil."""

    def text(self, preference: Preference) -> Any:
        return ", ".join(f"{name} {round(100 * value)}" for name, value in preference.values.items()) + "\n"


class Scaled(Conditioner):
    """Right: what those that gate spoil; each direction by what a matrix makes of the preference."""

    by: ClassVar[Any] = "gates"

    def parameters(self, shape: AdapterShape, generator: torch.Generator) -> Mapping[str, Any]:
        size = (shape.objectives, shape.layers * shape.rank)
        return {"weight": torch.randn(size, generator=generator), "bias": torch.ones(size[1])}

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        found = preference @ parameters["weight"] + parameters["bias"]
        return found.view(len(preference), shape.layers, shape.rank)


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


class DoublePrecision(Scaled):
    """Has first values in float64."""

    def parameters(self, shape: AdapterShape, generator: torch.Generator) -> Mapping[str, Any]:
        return {name: value.double() for name, value in super().parameters(shape, generator).items()}


class SeedOfItsOwn(Scaled):
    """Draws other first values each time, from a generator of its own."""

    _own: torch.Generator = PrivateAttr(default_factory=torch.Generator)

    def parameters(self, shape: AdapterShape, generator: torch.Generator) -> Mapping[str, Any]:
        return super().parameters(shape, self._own)


class Backwards(Scaled):
    """Has a negative learning rate."""

    def lr_factor(self, name: str) -> float:
        return -1.0


class TakesNothing(Scaled):
    """Refuses every adapter."""

    def check(self, rank: int, objectives: tuple[str, ...]) -> None:
        raise ConfigError("not this one")


class RefusesWithTheModel(Scaled):
    """Refuses an adapter when the model is loaded already."""

    def parameters(self, shape: AdapterShape, generator: torch.Generator) -> Mapping[str, Any]:
        raise ConfigError("not this one")


class ToldByGates(Scaled):
    """Says that it tells of rewards, and has no text to do so."""

    @property
    def tells_rewards(self) -> bool:
        return True


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


class OfARow(Scaled):
    """Gates of the same value in each layer, without the dimension of layers."""

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        return super().gates(preference, parameters, shape).mean(1)


class Rounded(Scaled):
    """Returns bfloat16."""

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        return super().gates(preference, parameters, shape).bfloat16()


class Logarithms(Scaled):
    """Takes the logarithm of weights, of which some are 0."""

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        return super().gates(preference.log(), parameters, shape)


class RefusesLate(Scaled):
    """Finds out in the first step that the adapter does not suit it."""

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        if shape.rank % shape.objectives:
            raise ConfigError("not this one")
        return super().gates(preference, parameters, shape)


class InPlace(Scaled):
    """Writes into the preferences that it was given."""

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        return super().gates(preference.mul_(2), parameters, shape)


class Dropout(Scaled):
    """Leaves out gates at random, from a generator of its own."""

    _own: torch.Generator = PrivateAttr(default_factory=torch.Generator)

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        found = super().gates(preference, parameters, shape)
        return found * (torch.rand(found.shape, generator=self._own) < 0.9)


class Centred(Scaled):
    """Subtracts the mean over rows."""

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        return super().gates(preference - preference.mean(0), parameters, shape)


class Detached(Scaled):
    """Has no gradient."""

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        return super().gates(preference, parameters, shape).detach()


class OwnsTooMuch(Scaled):
    """Has a parameter that it never reads."""

    def parameters(self, shape: AdapterShape, generator: torch.Generator) -> Mapping[str, Any]:
        return {**super().parameters(shape, generator), "spare": torch.ones(3)}


class Stuck(Conditioner):
    """Is a product of two matrices that both are 0 at first."""

    by: ClassVar[Any] = "gates"

    def parameters(self, shape: AdapterShape, generator: torch.Generator) -> Mapping[str, Any]:
        return {"one": torch.zeros(shape.objectives, 3), "two": torch.zeros(3, shape.layers * shape.rank)}

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        found = 1 + preference @ parameters["one"] @ parameters["two"]
        return found.view(len(preference), shape.layers, shape.rank)


class Steep(Scaled):
    """Takes roots of weights of which some are 0, times a parameter."""

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        found = (preference @ parameters["weight"] * 0).abs().sqrt() + preference @ parameters["weight"]
        return (found + parameters["bias"]).view(len(preference), shape.layers, shape.rank)


class Deaf(Scaled):
    """Does not look at the preference."""

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        return super().gates(torch.ones_like(preference), parameters, shape)


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
    DoublePrecision: "'weight': torch.float64",
    SeedOfItsOwn: "generators of the same seed",
    Backwards: r"lr_factor\('weight'\)",
    TakesNothing: "each refused, the last: ConfigError: not this one",
    LearnedText: r"\['soft'\], though `by` is \"text\"",
    NoText: "got:    ' '",
    Listed: r"got:    \['helpful",
    Paraphrases: "another text the second time",
    CallsByName: "with a name",
    Empties: "the preference changed during the call",
    SaysNoNumbers: "the same text, 'Be helpful and harmless",
    OfARow: r"torch.float32 \[\d+, 4\]",
    Rounded: "got:    torch.bfloat16",
    Logarithms: "a gate that is NaN or inf",
    RefusesLate: "gates must take any(.|\n)*refuse an adapter in check",
    RefusesWithTheModel: "first values(.|\n)*refuse an adapter in check",
    ToldByGates: "reading tells_rewards",
    TellsNothing: "the same text, 'helpful, harmless",
    TellsOfPositiveOnes: "rewards 0, 0(.|\n)*ValueError: ",
    TellsByChance: "the same rewards twice",
    InPlace: "it was given changed during the call",
    Dropout: "other gates the second time",
    Centred: "no mean, ranking or normalising over rows",
    Detached: "gates without a graph",
    OwnsTooMuch: r"none for \['spare'\]",
    Stuck: "none for any parameter",
    Steep: "one that is not finite",
    Deaf: "the same gates",
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


class Slices(Conditioner):
    """Unusual and right: nothing to learn; each objective has rank directions of its own, where they divide."""

    by: ClassVar[Any] = "gates"

    def check(self, rank: int, objectives: tuple[str, ...]) -> None:
        if rank % len(objectives):
            raise ConfigError(f"rank {rank} cannot be shared out among {len(objectives)} objectives")

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Tensor:
        found = preference.repeat_interleave(shape.rank // shape.objectives, -1)
        return found[:, None, :].expand(-1, shape.layers, -1)


UNUSUAL = (Said, Scaled, Compass, Told, Slices)

"""Conditioners with gates that are wrong in one way each; the doc string says which. The last is unusual, and right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from moalign.api import AdapterShape, Conditioner, ConfigError


class Scaled(Conditioner):
    """Right: what those that gate spoil; each direction by what a matrix makes of the preference."""

    by: ClassVar[Any] = "gates"

    def parameters(self, shape: AdapterShape, generator: torch.Generator) -> Mapping[str, Any]:
        size = (shape.objectives, shape.layers * shape.rank)
        return {"weight": torch.randn(size, generator=generator), "bias": torch.ones(size[1])}

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Any:
        found = preference @ parameters["weight"] + parameters["bias"]
        return found.view(len(preference), shape.layers, shape.rank)


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
    DoublePrecision: "'weight': torch.float64",
    SeedOfItsOwn: "generators of the same seed",
    Backwards: r"lr_factor\('weight'\)",
    TakesNothing: "each refused, the last: ConfigError: not this one",
    OfARow: r"torch.float32 \[\d+, 4\]",
    Rounded: "got:    torch.bfloat16",
    Logarithms: "gates that are NaN or inf",
    RefusesLate: "gates must take any(.|\n)*refuse an adapter in check",
    RefusesWithTheModel: "first values(.|\n)*refuse an adapter in check",
    ToldByGates: "reading tells_rewards",
    InPlace: "it was given changed during the call",
    Dropout: "other gates the second time",
    Centred: "no mean, ranking or normalising over rows",
    Detached: "gates without a graph",
    OwnsTooMuch: r"none for \['spare'\]",
    Stuck: "none for any parameter",
    Steep: "one that is not finite",
    Deaf: "the same gates",
}


class Slices(Conditioner):
    """Unusual and right: nothing to learn; each objective has rank directions of its own, where they divide."""

    by: ClassVar[Any] = "gates"

    def check(self, rank: int, objectives: tuple[str, ...]) -> None:
        if rank % len(objectives):
            raise ConfigError(f"rank {rank} cannot be shared out among {len(objectives)} objectives")

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Tensor:
        found = preference.repeat_interleave(shape.rank // shape.objectives, -1)
        return found[:, None, :].expand(-1, shape.layers, -1)


UNUSUAL = (Scaled, Slices)

"""The kind conditioner: how a preference reaches one model that is trained for many of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api.plugin import Plugin
from moalign.batch import AdapterShape
from moalign.types import Preference

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Conditioner(Plugin):
    """How a preference reaches one model that is trained for many of them, so that it follows one it never saw.

    ``by`` says which way it takes:
    "text"     ``text`` stands in front of every prompt; the reference never sees it
    "gates"    ``gates`` scale the rank directions of the adapter, so that each preference has a plain LoRA adapter
    "vectors"  ``vectors`` stand in front of every prompt as virtual tokens; the reference never sees them

    The preferences that it is trained on are drawn, one for each prompt and round or step.
    """

    by: ClassVar[Literal["text", "gates", "vectors"]] = "text"

    concentration: float = Field(default=1.0, ge=0.01)
    """of the Dirichlet distribution that weights are drawn from: 1 is uniform, less favours the corners"""
    angles: tuple[float, float] | None = None
    """draw directions instead: of two objectives, with an angle between these degrees (0: the first objective alone);
    components may be negative"""
    per_prompt: int = Field(default=1, ge=1)
    """preferences drawn for each prompt of a round of sampled responses"""

    def check(self, rank: int, objectives: tuple[str, ...]) -> None:
        """Raise ConfigError where it cannot work with an adapter of this rank. Called before a model is loaded."""

    def draw(self, objectives: tuple[str, ...], rng: Random) -> Preference:
        """A preference to train on: weights, or where ``angles`` are given a direction."""
        if self.angles is not None:
            angle = math.radians(rng.uniform(*self.angles))
            return Preference("direction", dict(zip(objectives, (math.cos(angle), math.sin(angle)), strict=True)))
        drawn = [rng.gammavariate(self.concentration, 1.0) for _ in objectives]
        total = math.fsum(drawn)
        if not total:  # all too small for a float: one of them has, in the limit, everything
            drawn[rng.randrange(len(drawn))] = total = 1.0
        return Preference("weights", {name: each / total for name, each in zip(objectives, drawn, strict=True)})

    def text(self, preference: Preference) -> str:
        """What the model reads, where ``by`` is "text": in the system prompt of a conversation, else before the prompt,
        as it stands there, so that it brings what separates the two."""
        raise NotImplementedError

    @property
    def tells_rewards(self) -> bool:
        """Whether a sampled response is trained on behind a text of the rewards that it got (``text_of_rewards``), in
        the place of the text that asked for it. ``text`` then asks for rewards that suit the preference."""
        return False

    def text_of_rewards(self, rewards: Mapping[str, float]) -> str:
        """What ``text`` would say to ask for these rewards, by objective; larger is better."""
        raise NotImplementedError

    def parameters(self, shape: AdapterShape, generator: Generator) -> Mapping[str, Tensor]:
        """First values of tensors that the conditioner owns, by name; float32 on the CPU. They are trained with the
        adapter, as an objective's own are (``Objective.parameters``). ``generator``: for all that is drawn."""
        return {}

    def lr_factor(self, name: str) -> float:
        """What the learning rate of the adapter is multiplied by for the parameter ``name``."""
        return 1.0

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Tensor:
        """preference [N,M] -> [N,L,r], where ``by`` is "gates": what the r rank directions of each of L layers are
        multiplied by: x W^T + s (gate * x A^T) B^T. With the graph to the parameters."""
        raise NotImplementedError

    @property
    def virtual_tokens(self) -> int:
        """How many vectors stand in front of a prompt, where ``by`` is "vectors"; 1 at least."""
        raise NotImplementedError

    def vectors(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Tensor:
        """preference [N,M] -> float32 [N,k,D], where ``by`` is "vectors": the input embeddings of k virtual tokens
        (``virtual_tokens``), D being ``shape.width``; they follow the token that begins every prompt, if one does.
        With the graph to the parameters."""
        raise NotImplementedError

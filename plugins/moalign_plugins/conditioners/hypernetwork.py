"""A small network from the preference to the scale of every rank direction of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import AdapterShape, Conditioner

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "hypernetwork",
    "class": "Hypernetwork",
    "summary": "a learned embedding of the preference that scales every rank direction of every layer",
    "paper": "arXiv:2407.15762",
}


class Hypernetwork(Conditioner):
    """gates = 1 + tanh(w E + b) H: the preference is embedded in ``width`` numbers, and these scale the adapter.

    A conditional policy whose conditioning is in its parameters, arXiv 2407.15762, with more freedom than a soup: the
    scale of a direction need not be linear in the preference. H is drawn, so that preferences differ from the start;
    were all gates 1, the adapter would first learn what preferences have in common, and they would come apart slowly.
    """

    by: ClassVar[Literal["text", "gates", "vectors"]] = "gates"

    width: int = Field(default=16, ge=1)
    """numbers in the embedding of a preference"""
    spread: float = Field(default=1.0, ge=0)
    """standard deviation of a gate over the draws of H, where all embeddings are 1"""
    lr_scale: float = Field(default=5.0, gt=0)
    """the network's learning rate, as a multiple of the adapter's"""

    def parameters(self, shape: AdapterShape, generator: Generator) -> Mapping[str, Tensor]:
        import torch

        scales = torch.randn(self.width, shape.layers * shape.rank, generator=generator)
        return {
            "embedding": torch.randn(shape.objectives, self.width, generator=generator),
            "bias": torch.zeros(self.width),
            "scales": scales * (self.spread / self.width**0.5),
        }

    def lr_factor(self, name: str) -> float:
        return self.lr_scale

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Tensor:
        embedded = (preference @ parameters["embedding"] + parameters["bias"]).tanh()
        return 1 + (embedded @ parameters["scales"]).view(len(preference), shape.layers, shape.rank)

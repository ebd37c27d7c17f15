"""The preference among the singular values of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import AdapterShape, Conditioner, ConfigError

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "panacea",
    "class": "Panacea",
    "summary": "the preference in the place of singular values of the adapter, scaled by a learned number per layer",
    "paper": "arXiv:2402.02030",
}


class Panacea(Conditioner):
    """W + U diag(sigma_1 ... sigma_k, s w_1 ... s w_M) V^T, arXiv 2402.02030, equation 4.

    The last M rank directions belong to the objectives, ``directions`` to each, and are multiplied by s w with a
    learned s for each layer; the others serve all preferences. U and V are the factors of an ordinary adapter, which
    holds their singular values: it is not asked that they be orthogonal, so that one penalty of the paper is left out.
    """

    by: ClassVar[Literal["text", "gates", "vectors"]] = "gates"

    directions: int = Field(default=1, ge=1)
    """rank directions of each objective; 1 as in the paper"""
    scale: float = Field(default=1.0, gt=0)
    """first value of s"""

    def check(self, rank: int, objectives: tuple[str, ...]) -> None:
        if self.directions * len(objectives) >= rank:
            raise ConfigError(
                f"condition.directions: {self.directions} for each of {len(objectives)} objectives leave no rank of "
                f"{rank} (model.lora.r) that serves all preferences"
            )

    def parameters(self, shape: AdapterShape, generator: Generator) -> Mapping[str, Tensor]:
        import torch

        return {"scale": torch.full((shape.layers,), self.scale)}

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Tensor:
        import torch

        own = preference.repeat_interleave(self.directions, dim=1)
        scaled = own[:, None, :] * parameters["scale"][None, :, None]
        serving_all = scaled.new_ones(len(scaled), shape.layers, shape.rank - scaled.shape[-1])
        return torch.cat([serving_all, scaled], dim=-1)

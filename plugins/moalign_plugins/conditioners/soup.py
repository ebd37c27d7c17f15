"""A part of the adapter for each objective, mixed by the preference while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import AdapterShape, Conditioner, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "soup",
    "class": "Soup",
    "summary": "the rank shared out among the objectives, each part weighted by the preference",
    "paper": "arXiv:2407.15762, arXiv:2306.04488",
}


class Soup(Conditioner):
    """The update for preference w is D_0 + sum_k w_k D_k: a soup whose parts are trained to be mixed.

    Rewarded soups (arXiv 2306.04488) mix adapters that were trained one by one; conditional language policies (arXiv
    2407.15762) train the parts together, for the mixes themselves. ``shared`` rank directions are D_0, the others are
    shared out evenly among the objectives. Parts are weighted by the preference times the number of objectives, so that
    equal weights leave the adapter as it is.
    """

    by: ClassVar[Literal["text", "gates", "vectors"]] = "gates"

    shared: int = Field(default=0, ge=0)
    """rank directions that no preference weights"""

    def check(self, rank: int, objectives: tuple[str, ...]) -> None:
        left = rank - self.shared
        if left < len(objectives) or left % len(objectives):
            raise ConfigError(
                f"condition: of rank {rank} (model.lora.r) {left} are left for {len(objectives)} objectives, "
                f"which do not get equal parts; make model.lora.r - condition.shared a multiple of {len(objectives)}"
            )

    def gates(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Tensor:
        import torch

        each = (shape.rank - self.shared) // shape.objectives
        parts = (preference * shape.objectives).repeat_interleave(each, dim=1)
        row = torch.cat([torch.ones(len(parts), self.shared, dtype=parts.dtype, device=parts.device), parts], dim=1)
        return row[:, None, :].expand(-1, shape.layers, -1)

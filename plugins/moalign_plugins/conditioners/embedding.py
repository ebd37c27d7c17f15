"""The preference as a few learned vectors in front of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import AdapterShape, Conditioner

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "embedding",
    "class": "Embedding",
    "summary": "the preference as learned virtual tokens in front of the prompt, a soft prompt for each preference",
    "paper": "arXiv:2104.08691",
}


class Embedding(Conditioner):
    """vectors = s (E_0 + sum_k w_k E_k): soft prompts, one for each objective, mixed by the preference.

    That vectors in the place of token embeddings can be trained as a prompt, and best begin as embeddings of tokens of
    the vocabulary, is prompt tuning (arXiv 2104.08691), which has one prompt for one task and leaves the model as it
    is. Ours is that they are linear in the preference, and that the adapter is trained beside them, so that it learns
    to read them. E_k begin as drawn tokens, E_0 as 0; s, the spread of the base's embeddings, makes steps of the same
    learning rate mean the same whatever the base.
    """

    by: ClassVar[Literal["text", "gates", "vectors"]] = "vectors"

    concentration: float = Field(default=0.3, gt=0)
    """as for all conditioners, but near the corners: the model learns to read vectors by what they make different"""
    tokens: int = Field(default=16, ge=1)
    """virtual tokens in front of a prompt"""
    lr_scale: float = Field(default=50.0, gt=0)
    """learning rate of the vectors, as a multiple of the adapter's"""

    @property
    def virtual_tokens(self) -> int:
        return self.tokens

    def parameters(self, shape: AdapterShape, generator: Generator) -> Mapping[str, Tensor]:
        import torch

        assert shape.embeddings is not None
        chosen = torch.randint(len(shape.embeddings), (shape.objectives, self.tokens), generator=generator)
        return {
            "objectives": shape.embeddings[chosen] / shape.spread,
            "shared": torch.zeros(self.tokens, shape.width),
        }

    def lr_factor(self, name: str) -> float:
        return self.lr_scale

    def vectors(self, preference: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape) -> Tensor:
        mixed = (preference @ parameters["objectives"].flatten(1)).view(len(preference), self.tokens, shape.width)
        return shape.spread * (parameters["shared"] + mixed)

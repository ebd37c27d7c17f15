"""What a preference does to each row of a batch: gates of the adapter, and virtual tokens in front of the prompt.

A prompt with virtual tokens has placeholder ids where they stand, whose embeddings are replaced row by row, so that the
model computes what it computes for ``inputs_embeds`` with the vectors in them. All else (positions, padding, rows that
several responses share) is as for any prompt of that length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moalign import lora
from moalign.data.tokenise import Ids, Tokeniser


@dataclass(frozen=True, eq=False)
class RowConditions:
    """Of n rows; what is None is not there.

    ``gates`` [n,L,r]: what the rank directions of each layer are multiplied by (``lora.gated``).
    ``vectors`` [n,k,D]: input embeddings of the k positions of the row's prompt from ``place`` on.
    """

    gates: Tensor | None = None
    vectors: Tensor | None = None
    place: int = 0

    def take(self, rows: Sequence[int] | Tensor) -> RowConditions:
        """Those of the rows of these numbers, each as often as it is named."""
        gates, vectors = (None if values is None else values[rows] for values in (self.gates, self.vectors))
        return replace(self, gates=gates, vectors=vectors)

    def behind_prompt(self) -> RowConditions:
        """What is left of them for passes that do not hold the prompt any more."""
        return replace(self, vectors=None)


@contextmanager
def conditioned(model: Any, adapter: str | None, conditions: RowConditions | None) -> Iterator[None]:
    """Within the context a language model runs with this adapter, its rows conditioned; None: the bare base, which is
    not conditioned, as a reference."""
    gates = None if conditions is None else conditions.gates
    with lora.under(model.policy, adapter, gates), in_front(model.base, None if adapter is None else conditions):
        yield


@contextmanager
def in_front(
    base: nn.Module, conditions: RowConditions | None, padding: Tensor | None = None, width: int = 0
) -> Iterator[None]:
    """Within the context the vectors stand in the place of input embeddings of the model ``base``, row by row.

    ``padding`` [n]: positions of padding in front of each row's prompt. Passes of less than ``width`` positions do not
    hold the prompt, and are let through.
    """
    if conditions is None or conditions.vectors is None:
        yield
        return
    vectors = conditions.vectors
    rows, number, _ = vectors.shape
    starts = torch.zeros(rows, dtype=torch.long) if padding is None else padding
    positions = (starts.to(vectors.device) + conditions.place)[:, None] + torch.arange(number, device=vectors.device)
    index = positions[:, :, None].expand_as(vectors)

    def put(module: nn.Module, args: Any, embeddings: Tensor) -> Tensor:
        return embeddings if embeddings.shape[1] < width else embeddings.scatter(1, index, vectors.to(embeddings.dtype))

    hook = base.get_input_embeddings().register_forward_hook(put)  # type: ignore[operator]
    try:
        yield
    finally:
        hook.remove()


def place_of_vectors(tokeniser: Tokeniser) -> int:
    """Where virtual tokens stand in a prompt: behind the token that begins every one (BOS), else at the front."""
    return int(tokeniser.bos_id is not None and tokeniser.prompt("x")[:1] == (tokeniser.bos_id,))


def with_places(ids: Ids, number: int, tokeniser: Tokeniser, place: int | None = None) -> Ids:
    """The prompt with placeholders for so many virtual tokens. ``place``: that of ``place_of_vectors``, if known."""
    place = place_of_vectors(tokeniser) if place is None else place
    return (*ids[:place], *(tokeniser.pad_id,) * number, *ids[place:])


@torch.no_grad()
def embeddings_of(base: Any, most: int = 4096) -> Tensor:
    """Input embeddings of at most so many tokens, as they enter the model; float32 on the CPU."""
    table = base.get_input_embeddings()
    return table(torch.arange(min(len(table.weight), most), device=table.weight.device)[None])[0].float().cpu()

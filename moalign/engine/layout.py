"""How token sequences lie in the model's input: a row each, or one row for all that begin with the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moalign.data.tokenise import Sequence as TokenSequence

PADDING = -1  # segment of a position that belongs to no sequence


@dataclass(frozen=True, eq=False)
class Layout:
    """N sequences in B rows of L positions. A row is a prompt and then the responses to it, one after the other.

    Each response attends to the prompt and to itself, and its positions go on from the prompt's end, so the model
    computes for it what it would compute for prompt and response alone. The last token of a response predicts
    nothing and is left out, unless the layout is ``whole``. S is the number of response tokens.

    ``input_ids[B,L]``     padded on the right
    ``position_ids[B,L]``  place of the token in its own sequence; None: 0 to L-1, and plain causal attention
    ``segments[B,L]``      0 prompt, k the row's k-th response, -1 padding; None where every row holds one sequence
    ``source[S]``          flat indices into [B,L]: the hidden state that predicts each response token
    ``labels[S]``          the response tokens, sequence after sequence
    ``target[S]``          flat indices into [N,T]: where their log-probabilities belong
    ``counts``             response tokens of each sequence; they sum to S
    ``lengths``            positions of each row that are no padding
    ``context[N]``         flat indices into [B,L]: the last token of each sequence's prompt
    ``final[N]``           the same of the last token of each sequence; None unless the layout is whole
    """

    input_ids: Tensor
    position_ids: Tensor | None
    segments: Tensor | None
    source: Tensor
    labels: Tensor
    target: Tensor
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    width: int
    context: Tensor
    final: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[N,T]: T is one less than the longest sequence; column t is about token t + 1 of each sequence."""
        return len(self.counts), self.width

    @cached_property
    def mask(self) -> Tensor:
        """float32 [N,T], 1 at response tokens."""
        return self.place(torch.ones(len(self.labels), device=self.labels.device))

    def place(self, values: Tensor) -> Tensor:
        """[S] -> [N,T] with 0 elsewhere, differentiable; [S,D] -> [N,T,D]."""
        (rows, width), beside = self.shape, values.shape[1:]
        return values.new_zeros(rows * width, *beside).index_copy(0, self.target, values).view(rows, width, *beside)

    def place_known(self, values: Sequence[np.ndarray]) -> Tensor:
        """What is known of the response tokens of each of the N sequences -> [N,T] with 0 elsewhere."""
        return self.place(torch.from_numpy(np.concatenate(values)).to(self.input_ids.device))

    def attention(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the attention logits, [B,1,L,L]: 0 where a position attends to another, else the lowest."""
        if self.segments is None:
            return None
        own, other = self.segments[:, :, None], self.segments[:, None, :]
        allowed = ((other == 0) | (other == own)).tril_()
        mask = torch.full(allowed.shape, torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
        return mask.masked_fill_(allowed, 0.0)[:, None]

    def to(self, device: torch.device) -> Layout:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def lay_out(
    sequences: Sequence[TokenSequence],
    rows: Sequence[Sequence[int]],
    pad_id: int,
    multiple: int = 1,
    whole: bool = False,
) -> Layout:
    """The sequences in these rows of the model's input, each once; the sequences of a row have the same prompt.

    Rows are as long as the longest, rounded up to ``multiple``. ``whole``: with the last token of each response too.
    Raises ValueError where a row's prompts differ.
    """
    lengths = tuple(row_length([sequences[index] for index in row], whole) for row in rows)
    length = -(-max(lengths) // multiple) * multiple
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    positions = np.zeros_like(ids)
    segments = np.full_like(ids, PADDING)
    places: dict[int, np.ndarray] = {}
    last = np.zeros(len(sequences), dtype=np.int64)
    for number, row in enumerate(rows):
        prompt = sequences[row[0]].prompt
        end = len(prompt)
        ids[number, :end] = prompt
        positions[number, :end] = np.arange(end)
        segments[number, :end] = 0
        for segment, index in enumerate(row, 1):
            if sequences[index].prompt != prompt:
                raise ValueError(f"sequences {row[0]} and {index} lie in one row, but their prompts differ")
            response = sequences[index].response
            begin, end = end, end + len(response) - (not whole)
            ids[number, begin:end] = response[: end - begin]
            positions[number, begin:end] = len(prompt) + np.arange(end - begin)
            segments[number, begin:end] = segment
            last[index] = number * length + end - 1
            own = np.arange(begin - 1, begin - 1 + len(response)) + number * length
            own[0] = number * length + len(prompt) - 1  # the prompt's end predicts every first token
            places[index] = own
    width = max(len(sequence.ids) for sequence in sequences) - 1
    target = [
        index * width + np.arange(sequence.prompt_length - 1, len(sequence.ids) - 1)
        for index, sequence in enumerate(sequences)
    ]
    alone = all(len(row) == 1 for row in rows)
    return Layout(
        input_ids=torch.from_numpy(ids),
        position_ids=None if alone else torch.from_numpy(positions),
        segments=None if alone else torch.from_numpy(segments),
        source=torch.from_numpy(np.concatenate([places[index] for index in range(len(sequences))])),
        context=torch.tensor([int(places[index][0]) for index in range(len(sequences))]),
        final=torch.from_numpy(last) if whole else None,
        labels=torch.tensor([token for sequence in sequences for token in sequence.response]),
        target=torch.from_numpy(np.concatenate(target)),
        counts=tuple(len(sequence.response) for sequence in sequences),
        lengths=lengths,
        width=width,
    )


def one_by_one(sequences: Sequence[TokenSequence], pad_id: int, multiple: int = 1) -> Layout:
    """A row for each sequence."""
    return lay_out(sequences, [[index] for index in range(len(sequences))], pad_id, multiple)


def row_length(sequences: Sequence[TokenSequence], whole: bool = False) -> int:
    """Positions that sequences with one prompt fill together; ``whole`` as for ``lay_out``."""
    responses = sum(len(sequence.ids) - sequence.prompt_length - (not whole) for sequence in sequences)
    return sequences[0].prompt_length + responses

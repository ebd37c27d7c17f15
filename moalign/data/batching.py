"""Which pairs a step trains on, and their tensors. The content of a batch is a function of (seed, step) alone."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # label of a position that is not scored
MULTIPLE = 8  # rows are padded to a multiple of this many tokens


def pair_indices(dataset: PairDataset, seed: int, step: int, pairs_per_step: int) -> NDArray[np.int64]:
    """The pairs of step ``step`` (from 0): [pairs_per_step].

    Epochs are permutations of all pairs; steps run on across their ends, so that an epoch drops and repeats nothing.
    """
    return _slice_of_epochs(len(dataset.pairs), seed, step, pairs_per_step)


def group_pair_indices(dataset: PairDataset, seed: int, step: int, groups_per_step: int) -> NDArray[np.int64]:
    """All pairs of the groups (prompts) of step ``step``, group after group; epochs are permutations of the groups."""
    members = dataset.pairs_of_group
    return np.concatenate([members[i] for i in _slice_of_epochs(len(members), seed, step, groups_per_step)])


def micro_batches(
    pair_indices: NDArray[np.int64],
    dataset: PairDataset,
    pairs_per_micro: int,
    unit: Literal["pair", "group"] = "pair",
) -> list[NDArray[np.int64]]:
    """Consecutive parts of a step, at most ``pairs_per_micro`` pairs each.

    With the unit "group" a group's pairs stay together, even where they alone are more than ``pairs_per_micro``.
    """
    if unit == "pair":
        return np.split(pair_indices, range(pairs_per_micro, len(pair_indices), pairs_per_micro))
    group_of_pair = dataset.groups[dataset.pairs[pair_indices, 0]]
    cuts, begun = [], 0
    ends = [*(np.flatnonzero(np.diff(group_of_pair)) + 1), len(pair_indices)]
    for start, end in zip([0, *ends], ends, strict=False):
        if end - begun > pairs_per_micro and start > begun:
            cuts.append(start)
            begun = start
    return np.split(pair_indices, cuts)


def collate(dataset: PairDataset, pair_indices: NDArray[np.int64], pad_id: int) -> dict[str, Tensor]:
    """Tensors of a batch: every sequence once, padded on the right to L tokens, L a multiple of 8.

    ``rows[N]`` sequence numbers in the dataset; ``input_ids[N,L]``, ``attention_mask[N,L]``;
    ``labels[N,L-1]`` the next token, aligned with ``hidden[:, :-1]``: -100 outside the response, so that exactly the
    response with its end token is scored; ``response_mask[N,L-1]`` float, 1 where labels are not -100;
    ``pairs[P,2]`` rows of this batch, ``pair_objective[P]``, ``strength[P]``, ``rewards[N,M]``, ``groups[N]``.
    """
    import torch

    pairs = dataset.pairs[pair_indices]
    unique, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    order = np.argsort(first)  # rows in the order in which the pairs name them
    rows, row_of = unique[order], np.argsort(order)
    arrays: dict[str, Any] = {
        "rows": rows,
        "pairs": row_of[inverse.reshape(-1)].reshape(pairs.shape),
        "pair_objective": dataset.pair_objective[pair_indices],
        "strength": dataset.strength[pair_indices].astype(np.float32),
        "rewards": dataset.rewards[rows].astype(np.float32),
        "groups": dataset.groups[rows],
    }
    padded = pad_sequences([dataset.sequences[row] for row in rows], pad_id)
    return padded | {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def pad_sequences(sequences: list[Sequence], pad_id: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask``, ``labels`` and ``response_mask`` of some sequences, as in ``collate``."""
    import torch

    length = -(-max(len(sequence.ids) for sequence in sequences) // MULTIPLE) * MULTIPLE
    input_ids = np.full((len(sequences), length), pad_id, dtype=np.int64)
    attention = np.zeros((len(sequences), length), dtype=np.int64)
    labels = np.full((len(sequences), length - 1), IGNORED, dtype=np.int64)
    for i, sequence in enumerate(sequences):
        end, start = len(sequence.ids), sequence.prompt_length
        input_ids[i, :end] = sequence.ids
        attention[i, :end] = 1
        labels[i, start - 1 : end - 1] = sequence.ids[start:]
    mask = (labels != IGNORED).astype(np.float32)
    arrays = {"input_ids": input_ids, "attention_mask": attention, "labels": labels, "response_mask": mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _slice_of_epochs(units: int, seed: int, step: int, per_step: int) -> NDArray[np.int64]:
    """Units number ``step * per_step`` and following of the endless chain of epochs' permutations."""
    parts, at, end = [], step * per_step, (step + 1) * per_step
    while at < end:
        epoch, offset = divmod(at, units)
        part = _permutation(units, seed, epoch)[offset : offset + end - at]
        parts.append(part)
        at += len(part)
    return np.concatenate(parts)


@lru_cache(maxsize=8)
def _permutation(units: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Sorts raw Philox words, a stream that numpy keeps the same for ever; it does not promise that for shuffling."""
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(units)
    return np.argsort(words, kind="stable")

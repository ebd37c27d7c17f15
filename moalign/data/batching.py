"""Which pairs a step trains on. The content of a step is a function of (seed, step) alone."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moalign.data.dataset import PairDataset

if TYPE_CHECKING:
    from torch import Tensor


def pair_indices(dataset: PairDataset, seed: int, step: int, pairs_per_step: int) -> NDArray[np.int64]:
    """The pairs of step ``step`` (from 0): [pairs_per_step].

    Epochs are permutations of all pairs; steps run on across their ends, so that an epoch drops and repeats nothing.
    """
    return _slice_of_epochs(len(dataset.pairs), seed, step, pairs_per_step)


def group_pair_indices(dataset: PairDataset, seed: int, step: int, groups_per_step: int) -> NDArray[np.int64]:
    """All pairs of the groups (prompts) of step ``step``, group after group; epochs are permutations of the groups."""
    members = dataset.pairs_of_group
    return np.concatenate([members[i] for i in _slice_of_epochs(len(members), seed, step, groups_per_step)])


def groups_of(dataset: PairDataset, pairs: int) -> int:
    """How many groups have so many pairs on average, to the nearest; at least one."""
    return max(1, round(pairs * len(dataset.pairs_of_group) / len(dataset.pairs)))


def collate(dataset: PairDataset, pair_indices: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """What is known of some pairs and of the sequences ``rows`` [N] of the dataset that they name.

    ``pairs[P,2]`` indices into ``rows``, ``pair_objective[P]``, ``strength[P]``, ``rewards[N,M]``, ``groups[N]``, and
    ``advantages[N]``, ``preference[N,M]`` and ``preferred[P,M]`` where the dataset has them.
    """
    import torch

    order = np.argsort(rows, kind="stable")
    arrays: dict[str, Any] = {
        "pairs": order[np.searchsorted(rows, dataset.pairs[pair_indices], sorter=order)],
        "pair_objective": dataset.pair_objective[pair_indices],
        "strength": dataset.strength[pair_indices].astype(np.float32),
        "rewards": dataset.rewards[rows].astype(np.float32),
        "groups": dataset.groups[rows],
    }
    if dataset.advantages is not None:
        arrays["advantages"] = dataset.advantages[rows].astype(np.float32)
    if dataset.preference is not None:
        arrays["preference"] = dataset.preference[rows].astype(np.float32)
    if dataset.preferred is not None:
        arrays["preferred"] = dataset.preferred[pair_indices].astype(np.float32)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def collate_views(dataset: PairDataset, pair_indices: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """The views of some pairs: by name, int64 [P], indices into ``rows`` [N] of the dataset that hold them."""
    import torch

    order = np.argsort(rows, kind="stable")
    return {
        name: torch.from_numpy(order[np.searchsorted(rows, numbers[pair_indices], sorter=order)])
        for name, numbers in dataset.views.items()
    }


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

"""Whether hidden states on disk cost less than the layers that make them: a rule, so that a resumed run decides alike.

Rules of thumb for a machine, as in ``passes.Packing``: they decide how fast a run is. Times would differ from start to
start, and with them the rounding of what was computed anew or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moalign.data.dataset import PairDataset
from moalign.engine import shards
from moalign.engine.model import LanguageModel
from moalign.engine.passes import OPERATIONS_PER_SECOND

DISK_SHARE = 0.25  # at most so much of what is free
READ, WRITE = 5e8, 1e8  # bytes a second, checksums included; written files are flushed
ROW_SECONDS = 5e-5  # to find a row


@dataclass(frozen=True)
class Worth:
    """``limit``: bytes that they may take. ``against``: why they are not kept, None where they are."""

    limit: int
    against: str | None


def worth(model: LanguageModel, dataset: PairDataset, draws: int, groups: int, free: int) -> Worth:
    """Of keeping what the layers below the adapters compute for pairs of the dataset.

    ``draws``: pairs that one candidate trains on; ``groups`` of candidates are trained one after the other; ``free``
    bytes of disk. Each pair counts as a row, with its prompt once for each response, and each view of it with another
    prompt as one more: somewhat more than the truth, unless pairs of one prompt meet in the same step and share other
    rows. The limit is twice that, whatever is free, because what is kept must not depend on it.
    """
    pairs = min(len(dataset.pairs), draws)
    sequences, rows, positions = (pairs * each for each in _means(dataset))
    again = draws * groups / pairs - 1
    values = positions * model.head.weight.shape[1] * model.dtype.itemsize
    limit = 2 * int(values + sequences * shards.ENTRY_BYTES)
    if model.unskipped is not None:
        return Worth(limit, model.unskipped)
    weights = sum(parameter.numel() for layer in model.lower for parameter in layer.parameters())
    compute = again * positions * 2 * weights / OPERATIONS_PER_SECOND[model.device.type == "cuda"]
    keep = again * (values / READ + rows * ROW_SECONDS) + values / WRITE
    if keep >= compute:
        return Worth(limit, f"keeping them takes some {keep:.2g} s, computing them again {compute:.2g} s")
    if limit > DISK_SHARE * free:
        return Worth(limit, f"they may take {limit / 2**20:.0f} MiB, more than {DISK_SHARE:.0%} of the free disk")
    return Worth(limit, None)


def _means(dataset: PairDataset) -> tuple[float, float, float]:
    """Of a pair with its views: sequences, different prompts, which rows share, and tokens."""
    pairs = len(dataset.pairs)
    own = dataset.rows_of(np.arange(pairs)).reshape(pairs, -1)
    prompts = sum(len({dataset.sequences[index].prompt for index in each}) for each in own)
    tokens = sum(len(dataset.sequences[index].ids) for index in own.flat)
    return own.shape[1], prompts / pairs, tokens / pairs

"""The few judgements on which a form shows, before it is trained, what it would refuse later."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moalign.data.dataset import PairDataset

WAYS = 32  # in which scores are missing together, of which there can be many


def telling_rows(dataset: PairDataset) -> NDArray[np.int64]:
    """Of each objective the rows with the smallest and the largest score and one without a score, then a row of each
    way to lack scores."""
    rewards = dataset.rewards
    known = [np.flatnonzero(~np.isnan(column)) for column in rewards.T]
    ends = [
        int(rows[place])
        for column, rows in zip(rewards.T, known, strict=True)
        if len(rows)
        for place in (column[rows].argmin(), column[rows].argmax())
    ]
    lacking = [int(column.argmax()) for column in np.isnan(rewards).T if column.any()]
    ways = np.unique(np.isnan(rewards), axis=0, return_index=True)[1]
    return np.array(list(dict.fromkeys([*ends, *lacking, *sorted(ways.tolist())[:WAYS]])), dtype=np.int64)


def telling_pairs(dataset: PairDataset) -> NDArray[np.int64]:
    """The first pair of each objective that judges, and the first one with each telling row."""
    first = np.unique(dataset.pair_objective, return_index=True)[1].tolist()
    touching = [np.flatnonzero((dataset.pairs == row).any(1)) for row in telling_rows(dataset)]
    return np.array(sorted({*first, *(int(pairs[0]) for pairs in touching if len(pairs))}), dtype=np.int64)

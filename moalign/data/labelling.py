"""Labels of pairs of sampled responses: which of the two is better by one number for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moalign.data.dataset import PairDataset


@dataclass(frozen=True)
class Labelled:
    """``dataset``: with the pairs that are kept; ``ties``, ``close``: how many were not, and why; ``gap``: of those
    kept, on average (NaN where there are none)."""

    dataset: PairDataset
    ties: int
    close: int
    gap: float

    @property
    def figures(self) -> dict[str, float]:
        """For the metrics."""
        found = {"pairs": float(len(self.dataset.pairs)), "pairs/ties": float(self.ties)}
        return found | {"pairs/close": float(self.close), "pairs/gap": self.gap}


def label(
    dataset: PairDataset, signal: NDArray[np.float64], which: Literal["all", "best-worst"], gap: float
) -> Labelled:
    """The dataset's pairs, the response with the larger ``signal`` [N] first, and the difference as their strength.

    ``which``: "best-worst" keeps of each group's pairs the first of those that differ most. A pair that does not differ
    is a tie and dropped, one that differs by less than ``gap`` is too close and dropped.
    """
    first, second = dataset.pairs.T
    difference = signal[first] - signal[second]
    chosen = np.arange(len(difference))
    if which == "best-worst":
        each = [members[np.argmax(np.abs(difference[members]))] for members in dataset.pairs_of_group]
        chosen = np.array(each, dtype=np.int64)
    size = np.abs(difference[chosen])
    ties, close = size == 0, (size > 0) & (size < gap)
    kept = chosen[~(ties | close)]
    turned = np.where(difference[kept, None] > 0, dataset.pairs[kept], dataset.pairs[kept, ::-1])
    strength = np.abs(difference[kept])
    made = replace(
        dataset,
        pairs=np.ascontiguousarray(turned),
        pair_objective=dataset.pair_objective[kept],
        strength=strength,
        weights=None if dataset.weights is None else dataset.weights[kept],
    )
    return Labelled(made, int(ties.sum()), int(close.sum()), float(strength.mean()) if len(kept) else float("nan"))

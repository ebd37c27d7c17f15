"""Pairs of responses to different prompts, for measuring where no prompt has two that are judged unlike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moalign.data.dataset import PairDataset


def across_prompts(dataset: PairDataset) -> PairDataset | None:
    """For each objective its scored responses, from the lower half each with one from the upper half, where they have
    unlike scores and other prompts; None where there is no such pair.

    In the order of the scores, and of the file where these are equal, the n-th of 2m is compared with the (n + m)-th:
    each response stands in one pair, and all of a rarer label are compared. The larger score is chosen.
    """
    pairs, judges, strengths = [], [], []
    for index, column in enumerate(dataset.rewards.T):
        rows = np.unique(dataset.pairs)
        rows = rows[~np.isnan(column[rows])]
        ordered = rows[np.argsort(column[rows], kind="stable")]
        half = len(ordered) // 2
        for low, high in zip(ordered[:half], ordered[len(ordered) - half :], strict=True):
            if column[low] < column[high] and dataset.groups[low] != dataset.groups[high]:
                pairs.append((int(high), int(low)))
                judges.append(index)
                strengths.append(float(column[high] - column[low]))
    if not pairs:
        return None
    return replace(
        dataset,
        pairs=np.array(pairs, dtype=np.int64),
        pair_objective=np.array(judges, dtype=np.int64),
        strength=np.array(strengths, dtype=np.float64),
    )

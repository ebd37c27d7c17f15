"""How well samples balance being many and being right: B-STaR's score of what to train on. arXiv 2412.17256.

Of a prompt with n distinct kept answers, c of them correct: b = min(c / n*, 1) c / n, with n* the wished number of
correct ones, and 0 where nothing is kept. The score is the mean over prompts, in [0, 1]: the first factor asks for
exploration, the second for exploitation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moalign.diagnostics.prompts import numbered
from moalign.errors import MoalignError

WISHED = 8  # n*, as in the paper


def score(kept: ArrayLike, correct: ArrayLike, wished: int = WISHED) -> float:
    """From the numbers of distinct kept answers [Q] and of the correct ones among them [Q], for Q prompts.

    Raises MoalignError where more are correct than kept, or there are no prompts.
    """
    n, c = np.asarray(kept, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if len(n) == 0 or wished < 1:
        raise MoalignError("a balance score takes at least one prompt, and a wished number above 0")
    if (c > n).any() or (c < 0).any():
        raise MoalignError("correct answers are counted among the kept ones; there cannot be more of them")
    share = np.divide(c, n, out=np.zeros_like(n), where=n > 0)
    return float((np.minimum(c / wished, 1.0) * share).mean())


def counts(
    rewards: ArrayLike,
    correct: ArrayLike,
    prompts: Sequence[Hashable],
    answers: Sequence[str],
    threshold: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(kept [Q], correct [Q]): of each prompt the distinct answers whose reward is at least the threshold.

    An answer that was sampled twice counts once, and is kept, or correct, where it is so once.
    """
    places = numbered(prompts).tolist()
    kept: list[set[str]] = [set() for _ in set(places)]
    right: list[set[str]] = [set() for _ in kept]
    values, good = np.asarray(rewards, dtype=np.float64), np.asarray(correct, dtype=bool)
    for value, is_right, place, answer in zip(values, good, places, answers, strict=True):
        if value >= threshold:
            kept[place].add(answer)
            if is_right:
                right[place].add(answer)
    return np.array([len(each) for each in kept]), np.array([len(each) for each in right])


def sweep(
    rewards: ArrayLike,
    correct: ArrayLike,
    prompts: Sequence[Hashable],
    answers: Sequence[str],
    thresholds: Sequence[float],
    wished: int = WISHED,
) -> list[tuple[float, float]]:
    """(threshold, score) for each of the thresholds."""
    return [
        (float(threshold), score(*counts(rewards, correct, prompts, answers, threshold), wished))
        for threshold in thresholds
    ]


def best(swept: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The (threshold, score) with the highest score; of equal ones the lowest threshold, which keeps most."""
    return min(swept, key=lambda each: (-each[1], each[0]))


def grid(rewards: ArrayLike, number: int = 41) -> list[float]:
    """Thresholds that matter: the distinct rewards, or ``number`` of their quantiles where there are more.

    The paper's grid, -1 to 1 in steps of 0.01, is for one reward; these are for any.
    """
    values = np.unique(np.asarray(rewards, dtype=np.float64))
    if len(values) <= number:
        return [float(value) for value in values]
    return [float(value) for value in np.quantile(values, np.linspace(0, 1, number), method="lower")]

"""How good scores are on judged pairs: accuracy, calibration, agreement. Pure functions of numbers.

A judged pair has a difference d of scores, chosen minus rejected. Where d is 0 neither is put first, and the pair
counts a half, as a coin would have it; pairs that the judges called a tie are no judged pairs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moalign.errors import MoalignError
from moalign.pareto import standard_error_clustered

BINS = 10

Mean = tuple[float, float | None]  # a mean and its standard error; None: a single cluster, of which nothing can be said


def correct(differences: ArrayLike) -> NDArray[np.float64]:
    """[P] -> [P]: 1 where d > 0, a half where d = 0, else 0."""
    values = np.asarray(differences, dtype=np.float64)
    return (values > 0) + 0.5 * (values == 0)


def accuracy(differences: ArrayLike, groups: Sequence[Hashable]) -> Mean:
    """The mean of ``correct`` with the standard error that respects that pairs of one group go together."""
    return standard_error_clustered(correct(differences), groups)


def gain(differences: ArrayLike, baseline: ArrayLike, groups: Sequence[Hashable]) -> Mean:
    """Accuracy minus that of a baseline's differences, pair by pair on the same pairs."""
    return standard_error_clustered(correct(differences) - correct(baseline), groups)


def calibration_error(differences: ArrayLike, slope: ArrayLike = 1.0, bins: int = BINS) -> float:
    """Expected calibration error of P(chosen > rejected) = sigmoid(slope d); a slope for all pairs or for each, [P].

    Of each pair the confidence c = max(P, 1 - P) and y = ``correct(d)``; with bins of equal width over [1/2, 1], n_b
    of the P pairs in bin b, it is sum_b n_b / P |mean_b(y) - mean_b(c)|. arXiv 1706.04599.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) == 0:
        raise MoalignError("no pairs: calibration is a mean over pairs")
    confidence = sigmoid(np.asarray(slope) * np.abs(values))
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=correct(values) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(values))


def log_loss(differences: ArrayLike, slope: ArrayLike = 1.0) -> float:
    """The mean of -log sigmoid(slope d), in nats."""
    return float(np.logaddexp(0.0, -np.asarray(slope) * np.asarray(differences, dtype=np.float64)).mean())


def fitted_slope(differences: ArrayLike, largest: float = 1e6) -> float:
    """The slope >= 0 with the least ``log_loss``, which is convex in it: one over a temperature.

    0 where the mean difference is not positive; ``largest`` over the largest |d| where no pair is put in the wrong
    order, so that no slope is the best.
    """
    values = np.asarray(differences, dtype=np.float64)
    scale = float(np.abs(values).max(initial=0.0))
    if scale == 0 or values.mean() <= 0:
        return 0.0
    if (values >= 0).all():
        return largest / scale
    values = values / scale

    def slope_of_loss(slope: float) -> float:
        return float(-(values * sigmoid(-slope * values)).mean())

    low, high = 0.0, 1.0
    while slope_of_loss(high) < 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope_of_loss(middle) < 0 else (low, middle)
    return (low + high) / 2 / scale


def cross_fitted_slopes(differences: ArrayLike, groups: Sequence[Hashable]) -> NDArray[np.float64] | None:
    """[P]: for each pair the ``fitted_slope`` of the other half of the groups, so that no pair chooses its own.

    The halves are drawn once for all (seed 0). None where a half has no pair in the wrong order: no slope is the best.
    """
    values = np.asarray(differences, dtype=np.float64)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    order = np.random.default_rng(0).permutation(len(numbers))
    half = np.array([order[numbers[group]] % 2 for group in groups])
    if any(not (values[half == side] < 0).any() for side in (0, 1)):
        return None
    slopes = [fitted_slope(values[half == side]) for side in (0, 1)]
    return np.where(half == 0, slopes[1], slopes[0])


def agreement(differences: ArrayLike, judges: ArrayLike) -> list[list[float | None]]:
    """[P,M] differences under M heads of pairs judged by objectives [P] -> [M,M].

    Entry (i, j): on the pairs that objective i judged, how often head j puts the chosen one first (equal: a half).
    None where i has judged none. The diagonal is accuracy.
    """
    values, by = np.asarray(differences, dtype=np.float64), np.asarray(judges)
    right = correct(values)
    rows: list[list[float | None]] = []
    for index in range(values.shape[1]):
        mine = right[by == index]
        rows.append(mine.mean(0).tolist() if len(mine) else [None] * values.shape[1])
    return rows


def spearman(scores: ArrayLike) -> list[list[float | None]]:
    """[N,M] -> [M,M]: correlation of ranks between heads, equal scores sharing the mean of their ranks.

    None where a head gives all rows the same score.
    """
    ranks = np.stack([_ranks(column) for column in np.asarray(scores, dtype=np.float64).T])
    centred = ranks - ranks.mean(1, keepdims=True)
    products, norms = centred @ centred.T, np.sqrt((centred**2).sum(1))
    return [
        [float(products[i, j] / (norms[i] * norms[j])) if norms[i] and norms[j] else None for j in range(len(ranks))]
        for i in range(len(ranks))
    ]


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over members (n - 1); None for a single one."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def sigmoid(values: ArrayLike) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(values, dtype=np.float64)))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean = ends - (counts - 1) / 2.0
    return np.asarray(mean[place], dtype=np.float64)

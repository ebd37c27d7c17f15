"""Measures of a front: which points are dominated, and how good the set is. All objectives are maximised.

Points are ``[n, M]``: n points, M objectives, in one common unit per objective. NaN and infinity are refused
everywhere. Domination, hypervolume and IGD+ come from moocore.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moalign.errors import MoalignError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates (at least as good everywhere and better somewhere); bool [n].

    Equal points do not dominate each other: all copies of a non-dominated point are non-dominated.
    """
    import moocore

    matrix = _matrix(points, "points")
    if len(matrix) == 0:
        return np.zeros(0, dtype=bool)
    return np.asarray(moocore.is_nondominated(matrix, maximise=True, keep_weakly=True), dtype=bool)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume between ``reference`` [M] and the points; 0 for no points, never negative (Zitzler & Thiele 1999).

    A point that is not above the reference in every objective spans no volume and contributes nothing.
    """
    import moocore

    corner = _matrix(np.asarray(reference, dtype=np.float64)[None], "reference point")[0]
    matrix = _matrix(points, "points", columns=len(corner))
    above = matrix[(matrix > corner).all(axis=1)]
    # Measured from the corner, so that a large offset shared by all points costs no digits.
    return float(moocore.hypervolume(above - corner, ref=0.0, maximise=True)) if len(above) else 0.0


def hypervolumes(points: ArrayLike, groups: Sequence[Hashable], reference: ArrayLike) -> dict[Hashable, float]:
    """Hypervolume of the points of each group, such as those of one seed; by group, in the order first met."""
    matrix = _matrix(points, "points")
    members: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, group in zip(range(len(matrix)), groups, strict=True):
        members[group].append(place)
    return {group: hypervolume(matrix[places], reference) for group, places in members.items()}


def expected_utility(points: ArrayLike, weights: ArrayLike) -> float:
    """Mean over the rows of ``weights`` [W, M] of the best ``w . p`` among the points (Zintgraf et al. 2015)."""
    matrix, directions = _matrix(points, "points"), _matrix(weights, "weights")
    _refuse_empty(matrix, "points")
    _refuse_empty(directions, "weights")
    _matrix(directions, "weights", columns=matrix.shape[1])
    return float((directions @ matrix.T).max(axis=1).mean())


def igd_plus(points: ArrayLike, target: ArrayLike) -> float:
    """Mean shortfall of the points from each point of ``target`` [t, M]; 0 when all are reached (arXiv 1503.02960)."""
    import moocore

    goal = _matrix(target, "target")
    matrix = _matrix(points, "points", columns=goal.shape[1])
    _refuse_empty(matrix, "points")
    _refuse_empty(goal, "target")
    return float(moocore.igd_plus(matrix, ref=goal, maximise=True))


def sparsity(points: ArrayLike) -> float | None:
    """Sum over objectives of the squared gaps along the front, over (points - 1); smaller is denser (PGMORL, 2020).

    Of the distinct non-dominated points. None for fewer than two: a lone point has no gaps and is not dense.
    """
    matrix = _matrix(points, "points")
    front = np.unique(matrix[non_dominated(matrix)], axis=0)
    if len(front) < 2:
        return None
    return float((np.diff(np.sort(front, axis=0), axis=0) ** 2).sum() / (len(front) - 1))


def standard_error_clustered(values: ArrayLike, clusters: Sequence[Hashable]) -> tuple[float, float | None]:
    """Mean of ``values`` [n] and its standard error when values of one cluster (say, one prompt) go together.

    sqrt(G / (G-1) * sum_g (sum_{i in g} (x_i - mean))^2) / n with G clusters of any sizes (CR1; arXiv 2411.00640);
    with one value per cluster this is s / sqrt(n). The error is None for a single cluster: nothing can be said.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) != len(clusters) or len(numbers) == 0:
        raise MoalignError(f"{numbers.size} values and {len(clusters)} clusters: one cluster per value, at least one")
    if not np.isfinite(numbers).all():
        raise MoalignError(f"value {int(np.argmin(np.isfinite(numbers)))} is not a finite number")
    mean = math.fsum(numbers) / len(numbers)
    sums: defaultdict[Hashable, float] = defaultdict(float)
    for number, cluster in zip(numbers, clusters, strict=True):
        sums[cluster] += float(number) - mean
    count = len(sums)
    if count == 1:
        return mean, None
    total = math.fsum(deviation**2 for deviation in sums.values())
    return mean, math.sqrt(count / (count - 1) * total) / len(numbers)


def _matrix(values: ArrayLike, what: str, columns: int | None = None) -> NDArray[np.float64]:
    """``values`` as finite float64 [n, M] with M >= 1 (M = ``columns`` where given)."""
    try:
        matrix = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MoalignError(f"{what}: not a table of numbers: {error}") from error
    if matrix.ndim == 1 and matrix.size == 0:
        matrix = matrix.reshape(0, columns or 1)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise MoalignError(f"{what}: shape {matrix.shape}, expected one row per point and one column per objective")
    if columns is not None and matrix.shape[1] != columns:
        raise MoalignError(f"{what}: {matrix.shape[1]} objectives, expected {columns}")
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise MoalignError(f"{what}: row {row}, objective {column} is {matrix[row, column]}, not a finite number")
    return matrix


def _refuse_empty(matrix: NDArray[np.float64], what: str) -> None:
    if len(matrix) == 0:
        raise MoalignError(f"{what}: empty; at least one row is needed")

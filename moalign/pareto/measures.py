"""Measures of a front: which points are dominated, and how good the set is. All objectives are maximised.

Points are ``[n, M]``: n points, M objectives, in one common unit per objective. NaN and infinity are refused
everywhere. Domination, hypervolume and IGD+ come from moocore.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moalign.pareto.points import matrix, refuse_empty, vector

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point dominates (at least as good everywhere and better somewhere); bool [n].

    Equal points do not dominate each other: all copies of a non-dominated point are non-dominated.
    """
    import moocore

    table = matrix(points, "points")
    if len(table) == 0:
        return np.zeros(0, dtype=bool)
    return np.asarray(moocore.is_nondominated(table, maximise=True, keep_weakly=True), dtype=bool)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume between ``reference`` [M] and the points; 0 for no points, never negative (Zitzler & Thiele 1999).

    A point that is not above the reference in every objective spans no volume and contributes nothing.
    """
    import moocore

    corner = vector(reference, "reference point")
    table = matrix(points, "points", columns=len(corner))
    above = table[(table > corner).all(axis=1)]
    # Measured from the corner, so that a large offset shared by all points costs no digits.
    return float(moocore.hypervolume(above - corner, ref=0.0, maximise=True)) if len(above) else 0.0


def hypervolumes(points: ArrayLike, groups: Sequence[Hashable], reference: ArrayLike) -> dict[Hashable, float]:
    """Hypervolume of the points of each group, such as those of one seed; by group, in the order first met."""
    rows = matrix(points, "points")
    members: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, group in zip(range(len(rows)), groups, strict=True):
        members[group].append(place)
    return {group: hypervolume(rows[places], reference) for group, places in members.items()}


def contributions(points: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """What the hypervolume loses without each point [n]: the volume that it alone spans.

    0 for dominated points, and for every copy of a point that is there twice: no single one of them is missed.
    """
    corner = vector(reference, "reference point")
    table = matrix(points, "points", columns=len(corner))
    distinct, places, copies = np.unique(table, axis=0, return_inverse=True, return_counts=True)
    alone = non_dominated(distinct) & (copies == 1)
    whole = hypervolume(distinct, corner)
    lost = np.zeros(len(distinct))
    for place in np.flatnonzero(alone):
        lost[place] = max(0.0, whole - hypervolume(np.delete(distinct, place, axis=0), corner))
    return np.asarray(lost[places.reshape(-1)])


def expected_utility(points: ArrayLike, weights: ArrayLike) -> float:
    """Mean over the rows of ``weights`` [W, M] of the best ``w . p`` among the points (Zintgraf et al. 2015)."""
    table, directions = matrix(points, "points"), matrix(weights, "weights")
    refuse_empty(table, "points")
    refuse_empty(directions, "weights")
    matrix(directions, "weights", columns=table.shape[1])
    return float((directions @ table.T).max(axis=1).mean())


def igd_plus(points: ArrayLike, target: ArrayLike) -> float:
    """Mean shortfall of the points from each point of ``target`` [t, M]; 0 when all are reached (arXiv 1503.02960)."""
    import moocore

    goal = matrix(target, "target")
    table = matrix(points, "points", columns=goal.shape[1])
    refuse_empty(table, "points")
    refuse_empty(goal, "target")
    return float(moocore.igd_plus(table, ref=goal, maximise=True))


def sparsity(points: ArrayLike) -> float | None:
    """Sum over objectives of the squared gaps along the front, over (points - 1); smaller is denser (PGMORL, 2020).

    Of the distinct non-dominated points. None for fewer than two: a lone point has no gaps and is not dense.
    """
    table = matrix(points, "points")
    front = np.unique(table[non_dominated(table)], axis=0)
    if len(front) < 2:
        return None
    return float((np.diff(np.sort(front, axis=0), axis=0) ** 2).sum() / (len(front) - 1))

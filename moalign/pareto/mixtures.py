"""What mixtures of policies reach: one of several, chosen at random, has every convex combination of their scores."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from moalign.pareto.grid import grid
from moalign.pareto.measures import non_dominated
from moalign.pareto.points import matrix, vector
from moalign.pareto.polytopes import MOST_OBJECTIVES, ZERO, hull, volume_below

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

BETTER = 1e-9  # of the points' range


def mixture_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points [n,M] some mixture of the others dominates; bool [n]. Those that one other dominates are among them.

    Equal points do not dominate each other, as in ``non_dominated``. By linear programming: the largest sum of what a
    mixture has more than the point, while it has less nowhere; above 1e-9 of the range it counts.
    A point that alone is best for some weights needs none.
    """
    table = matrix(points, "points")
    kept = non_dominated(table)
    spread = np.ptp(table, axis=0) if len(table) else np.ones(table.shape[1])
    scaled = (table - table.min(0, initial=np.inf)) / np.where(spread > 0, spread, 1.0)
    distinct = np.unique(scaled[kept], axis=0)
    found = ~kept
    for place in np.flatnonzero(kept & ~_best(scaled, distinct)):
        others = distinct[(distinct != scaled[place]).any(1)]
        found[place] = _surplus(others, scaled[place]) > BETTER
    return found


def _best(scaled: Array, distinct: Array) -> NDArray[np.bool_]:
    """Which points [n] are better than all of the distinct ones but their copies, for some weights: of an even grid, or
    like the scores of a point, for which it itself is the best on a round front."""
    weights = np.vstack([grid(scaled.shape[1]), distinct])
    if len(distinct) < 2:
        return np.ones(len(scaled), dtype=bool)
    second = np.partition(distinct @ weights.T, -2, axis=0)[-2]
    return np.asarray((scaled @ weights.T > second + BETTER).any(1))


def _surplus(others: Array, point: Array) -> float:
    """max of sum_j s_j, s >= 0, over mixtures of the others with mixture - s = point; 0 where there is none."""
    from scipy.optimize import linprog

    number, objectives = others.shape
    result = linprog(
        c=np.concatenate([np.zeros(number), -np.ones(objectives)]),
        A_eq=np.vstack(
            [np.hstack([others.T, -np.eye(objectives)]), np.concatenate([np.ones(number), np.zeros(objectives)])]
        ),
        b_eq=np.append(point, 1.0),
    )
    return -float(result.fun) if result.status == 0 else 0.0


def hypervolume_of_mixtures(points: ArrayLike, reference: ArrayLike) -> float | None:
    """Volume between ``reference`` [M] and all that is no better than some mixture of the points [n,M].

    At least the hypervolume of the points; a point below the reference somewhere counts as a part of mixtures. 0 where
    no mixture is above the reference everywhere; None for more than five objectives, whose hull has too many sides.
    """
    corner = vector(reference, "reference point")
    table = matrix(points, "points", columns=len(corner)) - corner
    if len(corner) > MOST_OBJECTIVES:
        return None
    table = np.unique(table[non_dominated(table)], axis=0)
    spread = table.max(0, initial=0.0)
    if len(table) == 0 or (spread <= 0).any():
        return 0.0
    if table.shape[1] == 1:
        return float(spread[0])
    scaled = table / spread
    if _height(scaled) <= ZERO:
        return 0.0
    # the boxes between the points and a floor: their hull is the hull of the points with everything below, floored
    floor = np.minimum(scaled.min(0), 0.0)
    sides = np.stack([np.broadcast_to(floor, scaled.shape), scaled])
    boxes = np.concatenate(
        [sides[list(choice), :, range(len(floor))].T for choice in product((0, 1), repeat=len(floor))]
    )
    boxes = np.unique(boxes, axis=0)
    if (floor == 0).all():
        return float(hull(boxes).volume) * float(spread.prod())
    return volume_below(*_upper_sides(boxes)) * float(spread.prod())


def _height(points: Array) -> float:
    """The largest t such that some mixture of the points is at least t in every objective."""
    from scipy.optimize import linprog

    number, objectives = points.shape
    result = linprog(
        c=np.append(np.zeros(number), -1.0),
        A_ub=np.hstack([-points.T, np.ones((objectives, 1))]),
        b_ub=np.zeros(objectives),
        A_eq=np.append(np.ones(number), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * number + [(None, None)],
    )
    return float(result.x[-1])


def _upper_sides(boxes: Array) -> tuple[Array, Array]:
    """Of the boxes' hull the sides that look up, as weights [m,M] and bounds [m]; the others are its floor."""
    sides = hull(boxes).equations
    normals = np.where(np.abs(sides[:, :-1]) < ZERO, 0.0, sides[:, :-1])
    upper = normals.min(1) >= 0
    return normals[upper], -sides[upper, -1]

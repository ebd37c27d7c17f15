"""Volumes and corners of the polytopes that weighted sums bound, by qhull, in units in which they are about 1 large."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.spatial import ConvexHull

    Array = NDArray[np.float64]

ZERO = 1e-10  # of what is about 1 large
DIGITS = 8  # within which sides, and corners, are one and the same
MOST_OBJECTIVES = 5  # whose corners are counted out: with six, a few dozen points have too many of them


def volume_below(weights: Array, bounds: Array) -> float:
    """Volume of {y >= 0 [M] : weights [m,M] y <= bounds [m]}, weights not negative; infinite where nothing bounds an
    objective."""
    rows = weights.max(1) > 0
    weights, bounds = weights[rows], bounds[rows]
    if (bounds <= 0).any():
        return 0.0
    reaches = np.divide(bounds[:, None], weights, out=np.full(weights.shape, np.inf), where=weights > 0)
    extents = reaches.min(0, initial=np.inf)
    if not np.isfinite(extents).all():
        return float("inf")
    scaled = weights * extents / bounds[:, None]
    scaled = scaled[scaled.sum(1) > 1]  # the rest bounds nothing that the box does not
    if len(scaled) == 0:
        return float(extents.prod())
    inside = np.full(len(extents), 1 / (2 * scaled.sum(1).max()))
    corners = corners_of(
        np.vstack([scaled, np.eye(len(extents)), -np.eye(len(extents))]),
        np.concatenate([np.ones(len(scaled) + len(extents)), np.zeros(len(extents))]),
        inside,
    )
    return float(hull(corners).volume) * float(extents.prod())


def corners_of(normals: Array, offsets: Array, inside: Array) -> Array:
    """Corners [c,M] of {y : normals [m,M] y <= offsets [m]}, which must be bounded and hold ``inside`` [M] well within,
    M at least 2."""
    from scipy.spatial import HalfspaceIntersection

    halves = _distinct(np.column_stack([normals, -offsets]))
    corners = _robustly(lambda options: HalfspaceIntersection(halves, inside, qhull_options=options)).intersections
    return _distinct(corners[np.isfinite(corners).all(1)] + 0.0)


def _distinct(rows: Array) -> Array:
    """One of the rows that are equal but for rounding, unrounded: rounded, sides that meet in one corner meet in many,
    which are too many for qhull."""
    return rows[np.unique(np.round(rows, DIGITS) + 0.0, axis=0, return_index=True)[1]]


def hull(points: Array) -> ConvexHull:
    """The convex hull of points [n,M] that span all M dimensions, M at least 2."""
    from scipy.spatial import ConvexHull

    return _robustly(lambda options: ConvexHull(points, qhull_options=options))


def _robustly(build: Callable[[str | None], Any]) -> Any:
    """By qhull's own options; where too many points lie in one plane for them, moved by about 1e-10 (QJ)."""
    from scipy.spatial import QhullError

    try:
        return build(None)
    except QhullError:
        return build("QJ")

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

    halves = np.unique(np.round(np.column_stack([normals, -offsets]), 12), axis=0)
    corners = _robustly(lambda options: HalfspaceIntersection(halves, inside, qhull_options=options)).intersections
    corners = corners[np.isfinite(corners).all(1)]
    return np.asarray(np.unique(np.round(corners, 12) + 0.0, axis=0))


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

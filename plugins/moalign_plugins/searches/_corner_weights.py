"""The upper surface S(w) = max_k w.v_k over the simplex: where it bends, and a bound of what lies above it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SAME = 1e-9  # of values scaled to 1
_FAR = 1000.0  # times the range of what is known
_DIGITS = 9


def corner_weights(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights [c,M] at the vertices of the convex surface S over the simplex, for value vectors [k,M].

    There, and nowhere else, can the gap between S and a convex function that it touches be largest (Roijers et al.
    2015). Those of the simplex itself are among them. In the order of their coordinates.
    """
    import numpy as np
    from scipy.spatial import HalfspaceIntersection

    objectives = values.shape[1]
    if objectives == 1:
        return np.ones((1, 1))
    distinct = _scaled(np.unique(values, axis=0))
    last, free = distinct[:, -1:], distinct[:, :-1] - distinct[:, -1:]  # w_M = 1 - the others
    top = np.abs(distinct).max() + 1.0
    above = np.hstack([free, -np.ones((len(distinct), 1)), last])  # free.w + last - z <= 0
    positive = np.hstack([-np.eye(objectives - 1), np.zeros((objectives - 1, 2))])
    below_one = np.append(np.ones(objectives - 1), [0.0, -1.0])[None]
    lid = np.append(np.zeros(objectives - 1), [1.0, -top])[None]
    inside = np.append(np.full(objectives - 1, 1 / objectives), top - 0.5)
    vertices = HalfspaceIntersection(np.vstack([above, positive, below_one, lid]), inside).intersections
    weights = np.hstack([vertices[:, :-1], 1 - vertices[:, :-1].sum(1, keepdims=True)])
    weights = np.clip(weights, 0.0, 1.0)
    on_surface = np.abs((weights @ distinct.T).max(1) - vertices[:, -1]) < 1e-7
    return np.unique(np.round(weights[on_surface], _DIGITS), axis=0)


def upper_bounds(
    wanted: NDArray[np.float64], weights: NDArray[np.float64], best: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The most that w.f can be at each wanted w [c,M], if w_i.f is at most ``best`` [n] at the weights w_i [n,M].

    The linear programme max w.f has the dual min sum_i c_i best_i over c >= 0 with sum_i c_i w_i = w: the lower convex
    envelope of the points (w_i, best_i), which is the largest of the planes of their hull's lower facets. An objective
    of which nothing was trained alone is taken for bounded far above all others, so that the gap is widest towards it.
    """
    import numpy as np
    from scipy.spatial import ConvexHull, QhullError

    alone = np.eye(weights.shape[1])
    far = best.max() + _FAR * (float(np.ptp(best)) or 1.0)
    corners = np.array([min(best[(weights == each).all(1)], default=far) for each in alone])
    if len(alone) == 1:
        return np.asarray(wanted @ corners)
    size = float(abs(best).max()) or 1.0
    points = np.column_stack([np.vstack([alone, weights])[:, :-1], np.append(corners, best) / size])
    try:
        planes = ConvexHull(points).equations
    except QhullError:  # flat: what bounds it is linear in the weights
        return np.asarray(wanted @ corners)
    lower = planes[planes[:, -2] < -_SAME]
    heights = (wanted[:, :-1] @ lower[:, :-2].T + lower[:, -1]) / -lower[:, -2]
    return np.asarray(heights.max(1) * size)


def _scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same surface, but for a linear function and a factor: near 1, so that rounding is."""
    centred = values - values.mean(0)
    size = float(abs(centred).max())
    return centred / size if size > _SAME else centred

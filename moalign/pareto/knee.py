"""Where the knee of a front is measured from (Das 1999, On characterizing the knee of the Pareto curve)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moalign.pareto.points import matrix

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def knee_plane(points: ArrayLike) -> tuple[list[float], float] | None:
    """Normal [M] and offset of the plane through the best points of each objective, in scores scaled to their range:
    a point's distance out of it is normal . point - offset, and the knee has the largest.

    None for fewer than three points, or where an objective is the same for all: there is no knee.
    """
    scores = matrix(points, "points")
    if len(scores) < 3 or (np.ptp(scores, axis=0) == 0).any():
        return None
    low, spread = scores.min(0), np.ptp(scores, axis=0)
    scaled = (scores - low) / spread
    # of equal bests the one that is better elsewhere
    corners = [max((row[j], sum(row), row) for row in scaled.tolist())[2] for j in range(scores.shape[1])]
    try:
        normal = np.linalg.solve(np.array(corners), np.ones(len(corners)))
    except np.linalg.LinAlgError:
        normal = np.full(len(corners), 1.0)
    if (normal <= 0).any():  # two objectives that rise together: the plane says nothing, the sum does
        normal = np.ones(len(corners))
    level = max(float(normal @ corner) for corner in corners)
    length = float(np.linalg.norm(normal))
    weights = normal / length / spread
    return weights.tolist(), float(level / length + weights @ low)

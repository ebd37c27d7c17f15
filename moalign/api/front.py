"""What searches compute with: outcomes as points, all objectives larger is better, and measures of sets of them.

The measures are those of ``moalign.pareto``, which loads its libraries only when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.types import Outcome, Space

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import numpy as np
    from numpy.typing import ArrayLike, NDArray


def values(outcome: Outcome, space: Space) -> tuple[float, ...]:
    """One number per objective [M]: its score, less what the policy's KL costs at ``space.kl_price``.

    The values of all policies are a convex set, with everything below them, where the scores are mean rewards.
    """
    cost = space.kl_price * (outcome.kl or 0.0)
    return tuple(outcome.scores[name] - cost for name in space.objectives)


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """bool [n] of points [n,M]: those that no other point dominates; equal points do not dominate each other."""
    from moalign import pareto

    return pareto.non_dominated(points)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume between the reference point [M] and the points [n,M]; 0 where no point is above it everywhere."""
    from moalign import pareto

    return pareto.hypervolume(points, reference)


def hypervolumes(points: ArrayLike, groups: Sequence[Hashable], reference: ArrayLike) -> dict[Hashable, float]:
    """``hypervolume`` of the points [n,M] of each group, such as one seed's; by group, in the order first met."""
    from moalign import pareto

    return pareto.hypervolumes(points, groups, reference)

"""Which points of a front stand alone, for searches that go on from these."""

from __future__ import annotations

from collections.abc import Sequence

from moalign.api import non_dominated


def crowding_distance(points: Sequence[Sequence[float]]) -> list[float]:
    """How far the neighbours on both sides are apart, over all objectives: n points [n,M] -> n (NSGA-II, Deb 2002).

    Each objective counts by its range over the points; what is first or last in one is infinitely far. Points that do
    not dominate each other, no two of them equal.
    """
    if not points:
        return []
    from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function

    found = get_crowding_function("cd").do(points) * len(points[0])  # pymoo has the mean over the objectives
    return [round(distance, 9) for distance in found.tolist()]


def loneliest(points: Sequence[Sequence[float]], count: int, used: Sequence[Sequence[float]] = ()) -> list[int]:
    """Indices of at most so many of the points that are not dominated, by crowding distance; of equals the first.

    Points with the same numbers count once. One that is among ``used`` is not chosen, but still a neighbour to others.
    """
    if not points:
        return []
    rows = [tuple(point) for point in points]
    free = non_dominated(rows).tolist()
    front = [index for index, row in enumerate(rows) if free[index] and row not in rows[:index]]
    distances = dict(zip(front, crowding_distance([rows[index] for index in front]), strict=True))
    taken = {tuple(point) for point in used}
    fresh = [index for index in front if rows[index] not in taken]
    return sorted(fresh, key=lambda index: -distances[index])[:count]

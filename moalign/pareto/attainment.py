"""What repeated runs reach: surfaces that all, half or some of them attain, and the spread of a measure.

The empirical attainment function of a point is the share of the runs with a point at least as good everywhere
(Grunert da Fonseca, Fonseca & Hall 2001). It is computed by moocore, for at most three objectives.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moalign.errors import MoalignError
from moalign.pareto.points import matrix, refuse_empty

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

MOST_OBJECTIVES = 3


def attainment(sets: Sequence[ArrayLike]) -> dict[str, NDArray[np.float64]] | None:
    """``worst``: the best that every one of the sets [n_i,M] attains, ``median``: half of them, ``best``: any of them;
    each the points [k,M] of a front, in the order of their coordinates. None for more than three objectives.

    Raises MoalignError where there is no set, one is empty, or they differ in their objectives.
    """
    if not sets:
        raise MoalignError("no sets of points; at least one is needed")
    first = matrix(sets[0], "set 0")
    tables = [matrix(each, f"set {place}", columns=first.shape[1]) for place, each in enumerate(sets)]
    for place, table in enumerate(tables):
        refuse_empty(table, f"set {place}")
    if first.shape[1] > MOST_OBJECTIVES:
        return None
    number = len(tables)
    return {"worst": _level(tables, number), "median": _level(tables, (number + 1) // 2), "best": _level(tables, 1)}


def _level(tables: Sequence[NDArray[np.float64]], runs: int) -> NDArray[np.float64]:
    """The front of all that at least so many runs attain."""
    import moocore

    if tables[0].shape[1] == 1:
        return np.array([[sorted((float(table.max()) for table in tables), reverse=True)[runs - 1]]])
    numbers = np.repeat(np.arange(1, len(tables) + 1), [len(table) for table in tables])
    found = moocore.eaf(-np.concatenate(tables), numbers, percentiles=[100 * runs / len(tables)])
    return np.asarray(np.unique(0.0 - found[:, :-1], axis=0))


def band(values: Sequence[float]) -> dict[str, float | None]:
    """``mean``, ``deviation`` (None for one value), ``lowest`` and ``highest`` of at least one number."""
    return {
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "lowest": min(values),
        "highest": max(values),
    }

"""What chance may have decided: standard errors, and which points they let be told apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moalign.errors import MoalignError
from moalign.pareto.points import matrix

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Z = 1.96  # two-sided, 5 in 100


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


def differ(points: ArrayLike, errors: ArrayLike, others: ArrayLike, other_errors: ArrayLike) -> NDArray[np.bool_]:
    """Which of the points [n,M] differ from which of the others [k,M] beyond chance; bool [n,k].

    They do where, in some objective, the difference is more than Z standard errors of it, the errors [n,M] and [k,M]
    taken as independent. Where an error is not known it is 0: then any difference counts.
    """
    one, other = matrix(points, "points"), matrix(others, "others")
    error = matrix(errors, "standard errors", one.shape[1])
    other_error = matrix(other_errors, "standard errors", other.shape[1])
    gaps = np.abs(one[:, None] - matrix(other, "others", one.shape[1])[None])
    return np.asarray((gaps > Z * np.hypot(error[:, None], other_error[None])).any(-1), dtype=bool)


def expected_utility_error(points: ArrayLike, errors: ArrayLike, weights: ArrayLike) -> float:
    """Standard error, at most, of the expected utility of points [n,M] with standard errors [n,M], over weights [W,M].

    That of the points that are best for the weights, as if all errors were one: points of a run are scored on the same
    prompts. That the best of several noisy points looks a little too good is not in it.
    """
    table, directions = matrix(points, "points"), matrix(weights, "weights")
    spreads = matrix(errors, "standard errors", columns=table.shape[1])
    best = (directions @ table.T).argmax(1)
    return float((directions * spreads[best]).sum(1).mean())

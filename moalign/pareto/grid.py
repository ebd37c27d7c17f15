"""Even grids of weights, over which a mean is the mean over preferences."""

from __future__ import annotations

import math
from collections.abc import Iterator

DIVISIONS, MOST = 20, 300


def even_weights(objectives: int, divisions: int) -> list[tuple[float, ...]]:
    """All weight vectors whose entries are multiples of 1 / divisions and sum to 1 (Das & Dennis 1998)."""
    return [tuple(part / divisions for part in parts) for parts in _compositions(divisions, objectives)]


def grid(objectives: int) -> list[tuple[float, ...]]:
    """The even weights of at most 20 divisions, and of as many as give at most 300 vectors; always the single ones."""
    fits = [number for number in range(1, DIVISIONS + 1) if math.comb(number + objectives - 1, number) <= MOST]
    return even_weights(objectives, max(fits, default=1))


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``total`` as an ordered sum of ``parts`` whole numbers from 0."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)

"""An alarm where one figure still rises while another, which it stands for, falls. arXiv 2311.00168.

The paper asks to look at how training rewards, KL and downstream scores go together over checkpoints; the rule here is
ours: after the best point of the second figure, up to the last, the first has risen and the second fallen, both beyond
chance, given that the best of several points is looked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

BLOCKS = 8
CHANCE = 0.025  # of an alarm where the second figure stands still, at most


@dataclass(frozen=True)
class Alarm:
    """Between the places ``start`` and ``end`` of the sequence the first figure rose and the second fell, by so
    much."""

    start: int
    end: int
    rise: float
    fall: float


@dataclass(frozen=True)
class Series:
    """A figure along candidates or steps: values [n], and standard errors [n], 0 where none is known."""

    values: tuple[float, ...]
    errors: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], errors: Sequence[float | None] | None = None) -> Series:
        known = [0.0] * len(values) if errors is None else [0.0 if each is None else each for each in errors]
        return cls(tuple(values), tuple(known))


def alarm(rising: Series, falling: Series) -> Alarm | None:
    """Between the best point of ``falling`` and the last one; None where either change is within z standard errors of
    it, the errors of two points taken as independent.

    The best point is chosen by looking at ``end`` of them, before the last one, so that z is the quantile of
    1 - ``CHANCE`` / end (Bonferroni): 1.96 for two points, 2.69 for eight.
    """
    if len(rising.values) != len(falling.values) or len(rising.values) < 2:
        return None
    start, end = int(np.argmax(falling.values)), len(falling.values) - 1
    if start == end:
        return None
    rise, fall = rising.values[end] - rising.values[start], falling.values[start] - falling.values[end]
    z = NormalDist().inv_cdf(1 - CHANCE / end)
    doubt = [z * math.hypot(each.errors[start], each.errors[end]) for each in (rising, falling)]
    return Alarm(start, end, rise, fall) if rise > doubt[0] and fall > doubt[1] else None


def blocks(values: ArrayLike, number: int = BLOCKS) -> Series:
    """Of a figure at every step [n], the means of ``number`` runs of steps of the same length, as far as may be, with
    their standard errors; fewer where there are not two steps for each."""
    steps = np.asarray(values, dtype=np.float64)
    parts = np.array_split(steps, max(1, min(number, len(steps) // 2)))
    errors = [float(part.std(ddof=1) / math.sqrt(len(part))) if len(part) > 1 else 0.0 for part in parts]
    return Series(tuple(float(part.mean()) for part in parts), tuple(errors))

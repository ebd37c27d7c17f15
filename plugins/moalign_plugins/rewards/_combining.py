"""One score of several members'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Combine = Literal["mean", "worst", "uncertainty"]


def combined(scores: Sequence[float], combine: Combine, lam: float) -> float:
    """Of one response's scores under the members; at least one."""
    mean = math.fsum(scores) / len(scores)
    if combine == "worst":
        return min(scores)
    if combine == "mean":
        return mean
    return mean - lam * math.fsum((score - mean) ** 2 for score in scores) / len(scores)

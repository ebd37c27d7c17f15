"""Reward against the distance from the reference: where more optimisation begins to cost. arXiv 2406.02900, 2210.10760.

R(x) = x (a - b log x) with x = sqrt(KL(pi || pi_ref)) and R the reward gained over the reference, so that R(0) = 0. For
b > 0 it has its one peak at x = exp(a / b - 1), where R = b x. The form is the one of arXiv 2210.10760 for online
reinforcement learning, written there with d = x; that it fits losses on pairs as well is what arXiv 2406.02900 finds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEWEST = 3  # points with x > 0, for two parameters and something left to see how well they fit


@dataclass(frozen=True)
class Curve:
    """``a`` and ``b``; ``residual``: root mean square of what the curve misses, in units of the reward."""

    a: float
    b: float
    residual: float
    points: int

    def __call__(self, x: ArrayLike) -> NDArray[np.float64]:
        """R at x >= 0."""
        at = np.asarray(x, dtype=np.float64)
        logs = np.log(np.where(at > 0, at, 1.0))
        return np.asarray(at * (self.a - self.b * logs))

    @property
    def peak(self) -> float | None:
        """sqrt(KL) of the highest point; None where b <= 0, and the curve has no highest point, or beyond any
        number."""
        if self.b <= 0 or self.a / self.b > math.log(1e300):
            return None
        return math.exp(self.a / self.b - 1)


def fit(x: ArrayLike, gained: ArrayLike) -> tuple[Curve | None, str]:
    """Least squares of the gained reward [n] over x = sqrt(KL) [n], and in words what is to be said of the result.

    a and b are the coefficients of x and -x log x, so that the fit is linear and unique. Points at x = 0 say nothing of
    them and are left out. None where fewer than ``FEWEST`` points are left, or all lie at one x.
    """
    at, values = np.asarray(x, dtype=np.float64), np.asarray(gained, dtype=np.float64)
    used = np.isfinite(at) & np.isfinite(values) & (at > 0)
    at, values = at[used], values[used]
    if len(at) < FEWEST:
        return None, f"too few points away from the reference: {len(at)}, and a curve takes {FEWEST}"
    columns = np.stack([at, -at * np.log(at)], axis=1)
    (a, b), _, rank, _ = np.linalg.lstsq(columns, values, rcond=None)
    if rank < 2:
        return None, "all points are equally far from the reference"
    residual = float(np.sqrt(np.mean((columns @ np.array([a, b]) - values) ** 2)))
    curve = Curve(float(a), float(b), residual, len(at))
    return curve, _said(curve, at)


def _said(curve: Curve, x: NDArray[np.float64]) -> str:
    if (curve(x) < 0).all():
        return "reward is below the reference's at every point: all of it is over-optimised"
    if curve.b <= 0:
        return "b is not above 0, so the curve has no peak: within these points nothing is over-optimised"
    if curve.peak is None:
        return "the peak lies beyond any distance that means something"
    if curve.peak > x.max():
        return "the peak lies beyond all points: it is extrapolated"
    if curve.peak < x.min():
        return "the peak lies before all points: it is extrapolated"
    return "the peak lies among the points: beyond it reward falls"

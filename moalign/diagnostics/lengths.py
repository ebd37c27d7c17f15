"""How long responses are, and how much of a reward is a matter of length. arXiv 2406.02900 looks at both."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moalign.diagnostics.prompts import numbered, within


@dataclass(frozen=True)
class Lengths:
    """Of responses, in tokens: mean, standard deviation (n - 1; None for one response), share cut off at the limit."""

    mean: float
    deviation: float | None
    truncated: float


def lengths(tokens: ArrayLike, ended: ArrayLike) -> Lengths:
    """``tokens`` [N], and whether each response ended by itself [N]."""
    values = np.asarray(tokens, dtype=np.float64)
    deviation = float(values.std(ddof=1)) if len(values) > 1 else None
    return Lengths(float(values.mean()), deviation, float(1 - np.asarray(ended, dtype=np.float64).mean()))


@dataclass(frozen=True)
class Slope:
    """``value``: reward for one more token, ``stderr`` clustered by prompt (None: one prompt), ``share``: how much of
    the variance of the reward within prompts length explains, R^2."""

    value: float
    stderr: float | None
    share: float


def slope(rewards: ArrayLike, tokens: ArrayLike, prompts: Sequence[Hashable]) -> Slope | None:
    """Least squares of rewards [N] on lengths [N], each less its mean over the responses to the same prompt.

    So it is not that some prompts ask for long answers and are easy. With centred x and y it is sum xy / sum xx, its
    error sqrt(G / (G - 1) sum_g (sum_{i in g} x_i e_i)^2) / sum xx with G prompts and residuals e (CR1). NaN rewards
    are left out. None where lengths do not vary within a prompt.
    """
    known = np.isfinite(np.asarray(rewards, dtype=np.float64))
    groups = [prompt for prompt, keep in zip(prompts, known, strict=True) if keep]
    if len(groups) < 2:
        return None
    table = np.stack([np.asarray(rewards, dtype=np.float64)[known], np.asarray(tokens, dtype=np.float64)[known]], 1)
    y, x = within(table, groups).T
    spread = float(x @ x)
    if spread <= 0:
        return None
    value = float(x @ y) / spread
    sums = np.bincount(numbered(groups), weights=x * (y - value * x))
    count, size = len(sums), float(y @ y)
    error = float(np.sqrt(count / (count - 1) * (sums**2).sum()) / spread) if count > 1 else None
    return Slope(value, error, value**2 * spread / size if size > 0 else 0.0)

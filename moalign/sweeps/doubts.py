"""How far the values of candidates and of the untouched model, means of few samples, may be from what they really are.

A candidate is surest of itself at its own weights: p* has the same w.r - price * log-ratio whatever it says. At others
it is not, so its error is found for each preference anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moalign.sweeps.optima import ERRORS, Array, Sampled


def of_point(
    point: Mapping[str, Any], names: Sequence[str], asked: Array, price: float, sampled: Sampled | None
) -> Array:
    """[W], for each of the weights ``asked`` [W,M] so much less may the point have of w.score - price * KL.

    Three standard errors, over its samples; where they are not kept no less than that, from the errors in the front.
    """
    errors = None if sampled is None else sampled.errors(asked, price)
    if errors is None:
        errors = _at_most(point, names, asked, price)
    return ERRORS * errors


def of_base(base: Mapping[str, Any], names: Sequence[str], asked: Array, sampled: Sampled | None) -> Array:
    """[W], so much more may the untouched model, which pays for no KL, have of w.score."""
    errors = None if sampled is None else sampled.errors(asked, 0.0)
    return ERRORS * (asked @ _stderr(base, names) if errors is None else errors)


def _at_most(point: Mapping[str, Any], names: Sequence[str], asked: Array, price: float) -> Array:
    """The standard deviation of a sum is at most the sum of its parts'; where none is known it counts as 0."""
    alone, details = _stderr(point, names), point["details"]
    if "utility_stderr" in details:  # of the sum at the point's own weights
        own = np.array([point["preference"]["values"][name] for name in names])
        return np.asarray(details["utility_stderr"] + np.abs(asked - own) @ alone)
    return np.asarray(asked @ alone + price * details.get("kl_stderr", 0.0))


def _stderr(measured: Mapping[str, Any], names: Sequence[str]) -> Array:
    """[M]"""
    return np.array([measured["stderr"].get(name) or 0.0 for name in names])

"""What any policy could reach for given weights, estimated from one policy's own samples.

With rewards r, weights w and a price b of a nat of KL, no policy has more of w.E[r] - b KL(policy || reference) than
V = mean over prompts of b log E_ref exp(w.r / b), which p* ~ pi_ref exp(w.r / b) attains (arXiv 2305.18290, eq. 4).
Under a policy pi this is b log E_pi exp(g) with g = w.r / b - log pi / pi_ref. The nearer pi is to p*, the less g
varies: for p* itself it is a constant. So good policies know best how good they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Optimum:
    """``value`` of the best policy, and its standard error over the samples: of these prompts, not of all prompts."""

    value: float
    stderr: float


def optimum(
    rewards: NDArray[np.float64], log_ratios: NDArray[np.float64], prompts: Sequence[int], price: float
) -> Optimum | None:
    """From the weighted rewards w.r [N] and the log-ratios log pi / pi_ref [N] of N responses sampled from pi.

    The logarithm of each prompt's mean, with the jackknife's correction of its bias and its variance. None where a
    prompt has one response, or a response no reward: nothing can be said.
    """
    if price <= 0 or not np.isfinite(rewards).all():
        return None
    exponents: defaultdict[int, list[float]] = defaultdict(list)
    for prompt, exponent in zip(prompts, rewards / price - log_ratios, strict=True):
        exponents[prompt].append(float(exponent))
    if min(map(len, exponents.values())) < 2:
        return None
    found = [_log_mean(np.array(each)) for each in exponents.values()]
    variance = sum(each for _, each in found)
    return Optimum(price * float(np.mean([mean for mean, _ in found])), price * float(np.sqrt(variance)) / len(found))


def _log_mean(exponents: NDArray[np.float64]) -> tuple[float, float]:
    """log mean exp, corrected by the jackknife, and the jackknife's variance of it."""
    number, top = len(exponents), exponents.max()
    terms = np.exp(exponents - top)
    whole = np.log(terms.mean()) + top
    without = np.array([np.log(np.delete(terms, place).mean()) for place in range(number)]) + top
    corrected = number * whole - (number - 1) * without.mean()
    return float(corrected), float((number - 1) / number * ((without - without.mean()) ** 2).sum())

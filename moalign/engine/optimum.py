"""What any policy could reach for given weights, estimated from one policy's own samples.

With rewards r, weights w and a price b of a nat of KL, no policy has more of w.E[r] - b KL(policy || reference) than
V = mean over prompts of b log E_ref exp(w.r / b), which p* ~ pi_ref exp(w.r / b) attains (arXiv 2305.18290, eq. 4).
Under a policy pi this is b log E_pi exp(g) with g = w.r / b - log pi / pi_ref. The nearer pi is to p*, the less g
varies: for p* itself it is a constant. So good policies know best how good they are. Where g varies much, rare samples
decide, and the logarithm of a mean of few is too low; b times mean and half the variance of g, which is V where g is
normal, then says more. The larger of the two with the larger error is what is taken for a bound.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEWEST = 4  # samples to a prompt


@dataclass(frozen=True)
class Optimum:
    """``value`` of the best policy, with its standard error over the samples: of these prompts, not of all prompts.

    ``normal``: the same, were g normal, with its error. ``deviation`` of g within prompts, in nats. ``reached``: the
    standard error of what the policy itself reaches.
    """

    value: float
    stderr: float
    normal: float
    normal_stderr: float
    deviation: float
    reached: float

    @property
    def bound(self) -> tuple[float, float]:
        """The larger of both estimates, and the larger of their errors."""
        return max(self.value, self.normal), max(self.stderr, self.normal_stderr)


def optimum(
    rewards: NDArray[np.float64], log_ratios: NDArray[np.float64], prompts: Sequence[int], price: float
) -> Optimum | None:
    """From the weighted rewards w.r [N] and the log-ratios log pi / pi_ref [N] of N responses sampled from pi.

    The logarithm of each prompt's mean, with the jackknife's correction of its bias and its variance. None where a
    prompt has fewer than ``FEWEST`` responses, or a response no reward: nothing can be said.
    """
    if price <= 0 or not np.isfinite(rewards).all() or not np.isfinite(log_ratios).all():
        return None
    exponents: defaultdict[int, list[float]] = defaultdict(list)
    for prompt, exponent in zip(prompts, rewards / price - log_ratios, strict=True):
        exponents[prompt].append(float(exponent))
    if min(map(len, exponents.values())) < FEWEST:
        return None
    samples = [np.array(each) for each in exponents.values()]
    found = [_log_mean(each) for each in samples]
    within = [float(each.var(ddof=1)) for each in samples]
    variance, number = float(np.mean(within)), sum(map(len, samples))
    reached = math.sqrt(sum(each / len(one) for each, one in zip(within, samples, strict=True))) / len(samples)
    half = variance / math.sqrt(2 * (number - len(samples)))  # standard error of half the variance, for normal g
    return Optimum(
        value=price * float(np.mean([mean for mean, _ in found])),
        stderr=price * math.sqrt(sum(each for _, each in found)) / len(samples),
        normal=price * (float(np.mean([each.mean() for each in samples])) + variance / 2),
        normal_stderr=price * math.hypot(reached, half),
        deviation=math.sqrt(variance),
        reached=price * reached,
    )


def _log_mean(exponents: NDArray[np.float64]) -> tuple[float, float]:
    """log mean exp, corrected by the jackknife, and the jackknife's variance of it."""
    number = len(exponents)
    whole = np.logaddexp.reduce(exponents) - math.log(number)
    before = np.append(-np.inf, np.logaddexp.accumulate(exponents)[:-1])
    after = np.append(np.logaddexp.accumulate(exponents[::-1])[-2::-1], -np.inf)
    without = np.logaddexp(before, after) - math.log(number - 1)
    corrected = number * whole - (number - 1) * without.mean()
    return float(corrected), float((number - 1) / number * ((without - without.mean()) ** 2).sum())

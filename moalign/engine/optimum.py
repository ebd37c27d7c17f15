"""What any policy could reach for given weights, estimated from one policy's own samples.

With rewards r, weights w and a price b of a nat of KL, no policy has more of w.E[r] - b KL(policy || reference) than
V = mean over prompts of b log E_ref exp(w.r / b), which p* ~ pi_ref exp(w.r / b) attains (arXiv 2305.18290, eq. 4).
Under a policy pi this is b log E_pi exp(g) with g = w.r / b - log pi / pi_ref. The nearer pi is to p*, the less g
varies: for p* itself it is a constant. So good policies know best how good they are, and bad ones not at all: where g
varies much, rare samples decide, and an estimate from few of them is too low more often than its error says.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# How much g may vary for the logarithm of n samples: a variance of so many log n. For normal g the estimate and three
# standard errors then miss the truth in at most 5 of 100 evaluations (4 to 32 samples, 8 and 40 prompts), in fewer the
# less it varies.
RELIABLE = 0.72
FEWEST = 4  # samples to a prompt


@dataclass(frozen=True)
class Optimum:
    """``value`` of the best policy, with its standard error over the samples: of these prompts, not of all prompts.

    ``deviation`` of g within prompts, in nats; ``reached``: of what the policy itself reaches, its standard error over
    the samples. ``samples`` to a prompt, at least.
    """

    value: float
    stderr: float
    deviation: float
    reached: float
    samples: int

    @property
    def reliable(self) -> bool:
        """Whether the error means what it says."""
        return self.samples >= FEWEST and self.deviation**2 <= RELIABLE * math.log(self.samples)


def optimum(
    rewards: NDArray[np.float64], log_ratios: NDArray[np.float64], prompts: Sequence[int], price: float
) -> Optimum | None:
    """From the weighted rewards w.r [N] and the log-ratios log pi / pi_ref [N] of N responses sampled from pi.

    The logarithm of each prompt's mean, with the jackknife's correction of its bias and its variance. None where a
    prompt has one response, or a response no reward: nothing can be said.
    """
    if price <= 0 or not np.isfinite(rewards).all() or not np.isfinite(log_ratios).all():
        return None
    exponents: defaultdict[int, list[float]] = defaultdict(list)
    for prompt, exponent in zip(prompts, rewards / price - log_ratios, strict=True):
        exponents[prompt].append(float(exponent))
    if min(map(len, exponents.values())) < 2:
        return None
    prompts_of = [np.array(each) for each in exponents.values()]
    found = [_log_mean(each) for each in prompts_of]
    variance = sum(each for _, each in found)
    within = [float(each.var(ddof=1)) for each in prompts_of]
    of_means = sum(each / len(one) for each, one in zip(within, prompts_of, strict=True))
    return Optimum(
        value=price * float(np.mean([mean for mean, _ in found])),
        stderr=price * math.sqrt(variance) / len(found),
        deviation=math.sqrt(np.mean(within)),
        reached=price * math.sqrt(of_means) / len(found),
        samples=min(map(len, prompts_of)),
    )


def _log_mean(exponents: NDArray[np.float64]) -> tuple[float, float]:
    """log mean exp, corrected by the jackknife, and the jackknife's variance of it."""
    number = len(exponents)
    whole = np.logaddexp.reduce(exponents) - math.log(number)
    others = [np.logaddexp.reduce(np.delete(exponents, place)) for place in range(number)]
    without = np.array(others) - math.log(number - 1)
    corrected = number * whole - (number - 1) * without.mean()
    return float(corrected), float((number - 1) / number * ((without - without.mean()) ** 2).sum())

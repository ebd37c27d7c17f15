"""How much of a gain in a proxy is sure to be a gain in what is meant. arXiv 2403.03185.

A proxy r that under the reference has the correlation rho with the gold reward R promises, for any policy pi,
    dR / sd(R) >= rho dr / sd(r) - sqrt(1 - rho^2) sqrt(chi2(pi || pi_ref))
with d the gain over the reference, sd and rho under it, and chi2 = E_pi[pi / pi_ref] - 1. With L = pi / pi_ref a gain
is E_ref[(L - 1) R]. Standardised, R is rho times r plus sqrt(1 - rho^2) times a part that is uncorrelated with r and
has variance 1, and Cauchy and Schwarz bound what L - 1 makes of that part. Since E_ref[L - 1] is 0 for each prompt, a
number for each prompt can be taken off both rewards first: correlation and deviations here are those within prompts,
which is all that a policy can act on. The paper writes it for occupancies; a response as a whole is one here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moalign.diagnostics.prompts import within
from moalign.diagnostics.starc import TRIVIAL
from moalign.pareto import standard_error_clustered

FEWEST = 10.0  # effective samples, below which an estimate of chi2 is a matter of few of them


@dataclass(frozen=True)
class ChiSquared:
    """``log_second``: log(1 + chi2), the logarithm of E_pi[pi / pi_ref]; ``stderr`` of chi2, None with one prompt; both
    it and ``value`` may be infinite where only the logarithm fits into a number.

    ``effective``: samples that the estimate rests on, (sum L)^2 / sum L^2; ``largest``: the share of the one that
    counts most.
    """

    log_second: float
    stderr: float | None
    effective: float
    largest: float
    samples: int

    @property
    def value(self) -> float:
        """chi2 >= exp(KL) - 1 >= KL, also of the estimates from the same samples."""
        return math.expm1(self.log_second) if self.log_second < 709 else math.inf

    @property
    def root(self) -> float:
        """sqrt(chi2); 0 where samples happen to give less than 0."""
        if self.log_second >= 709:
            return math.exp(self.log_second / 2) if self.log_second < 1400 else math.inf
        return math.sqrt(max(0.0, self.value))

    @property
    def dominated(self) -> bool:
        """Whether few samples decide: rarer and heavier ones are then likely to be missing, and chi2 is too small."""
        return self.effective < FEWEST


def chi_squared(log_ratios: ArrayLike, prompts: Sequence[Hashable]) -> ChiSquared:
    """chi2(pi || pi_ref) from the log-ratios log pi - log pi_ref [N], in nats, of N responses sampled from pi.

    The mean of L = exp(log-ratio), taken relative to the largest, so that nothing overflows; its standard error is
    clustered by prompt.
    """
    values = np.asarray(log_ratios, dtype=np.float64)
    top = float(values.max())
    relative = np.exp(values - top)
    mean, error = standard_error_clustered(relative, prompts)
    log_error = -math.inf if not error else math.log(error) + top
    stderr = None if error is None else math.exp(log_error) if log_error < 709 else math.inf
    total = float(relative.sum())
    effective = total**2 / float((relative**2).sum())
    return ChiSquared(top + math.log(mean), stderr, effective, float(relative.max()) / total, len(values))


@dataclass(frozen=True)
class Kinship:
    """Of proxy and gold reward under the reference, within prompts: correlation and standard deviations."""

    rho: float
    proxy_deviation: float
    gold_deviation: float


def kinship(proxy: ArrayLike, gold: ArrayLike, prompts: Sequence[Hashable]) -> Kinship | None:
    """From rewards [N] of responses sampled from the reference. None where nothing varies within a prompt, or each
    prompt has but one response.

    Variances divide by N less the number of prompts. What is left of rounding counts as nothing: deviations up to 1e-9
    of the reward's largest size.
    """
    values = np.stack([np.asarray(proxy, dtype=np.float64), np.asarray(gold, dtype=np.float64)], axis=1)
    table = within(values, prompts)
    freedom = len(table) - len(set(prompts))
    if freedom <= 0:
        return None
    products: NDArray[np.float64] = table.T @ table / freedom
    deviations = np.sqrt(np.diag(products))
    if (deviations <= TRIVIAL * np.abs(values).max(0)).any():
        return None
    rho = float(products[0, 1] / (deviations[0] * deviations[1]))
    return Kinship(min(1.0, max(-1.0, rho)), float(deviations[0]), float(deviations[1]))


def least_gain(rho: float, gain: float, chi2_root: float) -> float:
    """rho dr - sqrt(1 - rho^2) sqrt(chi2), in standard deviations of the gold reward; ``gain``: dr in those of the
    proxy. Where rho is 1 nothing is lost, however large chi2 is."""
    apart = math.sqrt(max(0.0, 1 - rho * rho))
    return rho * gain - (apart * chi2_root if apart else 0.0)

"""Best of n samples, and what is known exactly about it: its distribution, its KL, its unbiased estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

from pydantic import Field

from moalign.api import ConfigError, DataError, Decoder, PreferenceError, Request

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "best-of-n",
    "class": "BestOfN",
    "summary": "the best of n sampled responses by the preferred rewards, their weighted sum",
    "paper": "arXiv:2404.01730",
}


class BestOfN(Decoder):
    """Of n samples of one speaker the one with the largest sum_j w_j r_j; of equals the first.

    A response of which a reward that carries weight is unknown is chosen only where that is so for all of them: then
    nothing can be said, which is an error.
    """

    n: int = Field(default=4, ge=1)
    """samples of each prompt"""
    candidate: str | None = None
    """whose samples; without it the untouched base's"""

    def speakers(self, request: Request) -> list[str | None]:
        if not any(request.preference.values()):
            raise PreferenceError("best of n needs an objective with weight, whose reward says what is best")
        return [self.candidate]

    def responses(self) -> int:
        return self.n

    def keep(self, request: Request, rewards: Tensor) -> int:
        weights = rewards.new_tensor(list(request.preference.values()))
        carried = weights != 0
        sums = rewards[:, carried] @ weights[carried]
        if bool(sums.isnan().all()):
            raise DataError("the rewards are unknown for all of the sampled responses, so that none of them is best")
        return int(sums.nan_to_num(nan=-math.inf).argmax())


# --- what is known exactly ------------------------------------------------------------------------------------------


def pmf(probabilities: Sequence[float], rewards: Sequence[float], n: float) -> list[float]:
    """The probability that each of finitely many responses is the best of n independent samples.

    F(y)^n - F(y-)^n for the set of responses whose reward is that of y, with F the probability of a reward up to that
    of y and F- of one below (arXiv 2404.01730). Responses of equal reward share it in proportion to their own
    probabilities, as keeping the first, the last or any of the best samples by chance does. ``n`` above 0 need not be
    whole. Raises ConfigError for probabilities that are negative or whose sum is not 1 (to 1e-9).
    """
    _check(probabilities, rewards, n)
    classes: dict[float, list[int]] = {}
    for index, reward in enumerate(rewards):
        classes.setdefault(reward, []).append(index)
    ranked = [classes[reward] for reward in sorted(classes, reverse=True)]
    masses = [math.fsum(probabilities[index] for index in tied) for tied in ranked]
    above = accumulate(masses, initial=0.0)
    below = list(accumulate(reversed(masses), initial=0.0))[-2::-1]
    found = [0.0] * len(rewards)
    for tied, over, mass, under in zip(ranked, above, masses, below, strict=False):
        share = _power_difference(over, mass, under, n) / mass if mass > 0 else 0.0
        for index in tied:
            found[index] = probabilities[index] * share
    return found


def _power_difference(above: float, mass: float, below: float, n: float) -> float:
    """F^n - (F - mass)^n with F = mass + below = 1 - above, to the last digits of each of the three."""
    log_f = math.log1p(-above) if above < 0.5 else math.log(mass + below)
    if below <= 0:
        return math.exp(n * log_f)
    return -math.exp(n * log_f) * math.expm1(n * math.log1p(-mass / (mass + below)))


def kl(probabilities: Sequence[float], rewards: Sequence[float], n: float) -> float:
    """KL(best of n || the distribution that is sampled), exactly, in nats; see ``pmf``."""
    best = pmf(probabilities, rewards, n)
    terms = (q * math.log(q / p) for q, p in zip(best, probabilities, strict=True) if q > 0)
    return math.fsum(terms)


def kl_bound(n: float) -> float:
    """log n - (n - 1) / n, for n of at least 1: KL(best of n || p) is never more (arXiv 2404.01730).

    It is this much where no two samples are ever tied, so for no finite set of responses and n above 1.
    """
    return math.log(n) - (n - 1) / n


def estimate(scores: Sequence[float], n: int, proxy: Sequence[float] | None = None) -> float:
    """The expected score of the best of n by ``proxy`` (default: by the scores), without bias, from N >= n samples.

    sum_i C(i-1, n-1) / C(N, n) score_(i), the scores sorted ascending by the proxy: the mean over all subsets of n.
    Samples whose proxies are equal count alike, as where one of the best is kept by chance. The weights are made one
    from the other (w_N = n / N, w_i = w_(i+1) (i + 1 - n) / i), so that no N is too large. Raises ConfigError.
    """
    by = scores if proxy is None else proxy
    if not 1 <= n <= len(scores) or len(by) != len(scores):
        raise ConfigError(f"the best of {n}: from at least {n} scores, each with a proxy, not {len(scores)}")
    if not all(math.isfinite(value) for value in [*scores, *by]):
        raise ConfigError("scores and proxies must be finite numbers")
    order = sorted(range(len(by)), key=lambda index: by[index])
    weights, weight = [0.0] * len(order), n / len(order)
    for place in range(len(order), n - 1, -1):
        weights[place - 1] = weight
        weight *= (place - n) / (place - 1) if place > 1 else 0.0
    total = []
    for _, places in groupby(range(len(order)), key=lambda place: by[order[place]]):
        tied = list(places)
        mean = math.fsum(scores[order[place]] for place in tied) / len(tied)
        total.append(math.fsum(weights[place] for place in tied) * mean)
    return math.fsum(total)


def _check(probabilities: Sequence[float], rewards: Sequence[float], n: float) -> None:
    if len(probabilities) != len(rewards) or not all(math.isfinite(reward) for reward in rewards):
        raise ConfigError("every response needs a probability and a finite reward")
    if not n > 0 or not all(p >= 0 for p in probabilities) or not abs(math.fsum(probabilities) - 1) <= 1e-9:
        raise ConfigError(
            f"n is {n}, above 0; probabilities are not negative and their sum, {math.fsum(probabilities)}, is 1"
        )

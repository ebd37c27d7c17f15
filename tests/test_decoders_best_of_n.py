"""Best of n as mathematics: its distribution, KL and bound by enumeration, its estimator over all subsets."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations, product

import pytest
import torch

from moalign.api import ConfigError, DataError, PreferenceError, Request
from moalign_plugins.decoders.best_of_n import BestOfN, estimate, kl, kl_bound, pmf


def distribution(size, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(size, generator=generator, dtype=torch.float64) + 0.05
    return (weights / weights.sum()).tolist(), torch.randn(size, generator=generator, dtype=torch.float64).tolist()


def by_enumeration(probabilities, rewards, n):
    """All sequences of n samples; the first of the best is kept."""
    found = [0.0] * len(rewards)
    for drawn in product(range(len(rewards)), repeat=n):
        best = max(drawn, key=lambda index: rewards[index])  # max keeps the first of equal ones
        found[best] += math.prod(probabilities[index] for index in drawn)
    return found


# --- the distribution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_the_pmf_is_what_enumeration_finds(n, tied):
    probabilities, rewards = distribution(5, seed=n)
    if tied:
        rewards[3] = rewards[0]
        rewards[4] = rewards[1]
    found = pmf(probabilities, rewards, n)
    assert math.fsum(found) == pytest.approx(1, abs=1e-15)
    assert found == pytest.approx(by_enumeration(probabilities, rewards, n), abs=1e-14)


def test_keeping_the_last_or_any_of_the_best_is_the_same_distribution():
    probabilities, rewards = distribution(4, seed=0)
    rewards[2] = rewards[1]
    last = [0.0] * 4
    for drawn in product(range(4), repeat=3):
        best = max(reversed(drawn), key=lambda index: rewards[index])
        last[best] += math.prod(probabilities[index] for index in drawn)
    assert pmf(probabilities, rewards, 3) == pytest.approx(last, abs=1e-14)


def test_one_sample_is_the_distribution_itself_and_many_are_the_best():
    probabilities, rewards = distribution(6, seed=1)
    assert pmf(probabilities, rewards, 1) == pytest.approx(probabilities, abs=1e-15)
    best = max(range(6), key=lambda index: rewards[index])
    assert pmf(probabilities, rewards, 10**6)[best] == pytest.approx(1, abs=1e-15)


def test_equal_rewards_leave_the_distribution_as_it_is():
    probabilities, _ = distribution(6, seed=2)
    assert pmf(probabilities, [0.5] * 6, 17) == pytest.approx(probabilities, abs=1e-15)


def test_small_probabilities_keep_their_digits():
    """p = 1e-12 at the top, n = 10^6: 1 - (1 - p)^n = 9.999995e-7, which a difference of powers would lose."""
    found = pmf([1 - 1e-12, 1e-12], [0.0, 1.0], 10**6)
    assert found[1] == pytest.approx(-math.expm1(10**6 * math.log1p(-1e-12)), rel=1e-14)


def test_the_best_by_ones_own_likelihood_sharpens_towards_the_mode():
    """Sharpening (arXiv 2412.01951): with the log-probability for a reward, more samples move all mass to the mode."""
    probabilities, _ = distribution(6, seed=3)
    rewards = [math.log(p) for p in probabilities]
    mode = probabilities.index(max(probabilities))
    found = [pmf(probabilities, rewards, n)[mode] for n in (1, 4, 16, 64, 10**4)]
    assert found == sorted(found) and found[-1] == pytest.approx(1, abs=1e-12)


# --- KL and its bound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 16, 256, 10**5])
@pytest.mark.parametrize("tied", [False, True])
def test_the_kl_is_below_the_bound(n, tied):
    for seed in range(5):
        probabilities, rewards = distribution(7, seed)
        if tied:
            rewards = [round(reward) for reward in rewards]
        best = pmf(probabilities, rewards, n)
        plain = sum(q * math.log(q / p) for q, p in zip(best, probabilities, strict=True) if q)
        found = kl(probabilities, rewards, n)
        assert found == pytest.approx(plain, abs=1e-12)
        assert -1e-15 <= found <= kl_bound(n) + 1e-15
        if n > 1:
            assert found < kl_bound(n)  # finitely many responses are drawn twice, and such draws are ties


def test_the_bound_is_reached_as_ties_become_rare():
    """n equally likely responses of different rewards: the rest falls as 1 / size^2."""
    gaps = [kl_bound(4) - kl([1 / size] * size, list(range(size)), 4) for size in (10, 100, 1000)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[1] / gaps[2] == pytest.approx(100, rel=0.01)
    tied = kl([1 / 1000] * 1000, [index // 500 for index in range(1000)], 4)
    assert tied == pytest.approx(kl([0.5, 0.5], [0, 1], 4), abs=1e-12)  # equal responses are as one
    assert kl_bound(4) - tied > 0.1


def test_n_of_exp_delta_and_the_tilt_at_that_kl_come_close_for_long_sequences():
    """m i.i.d. tokens of worth 0 or 1 (arXiv 2404.01730): the rewards a token, at KL = 0.1 a token, approach."""

    def gap(m, rate=0.1, p=0.3):
        worth = list(range(m + 1))
        logs = [
            math.lgamma(m + 1)
            - math.lgamma(k + 1)
            - math.lgamma(m - k + 1)
            + k * math.log(p)
            + (m - k) * math.log1p(-p)
            for k in worth
        ]
        base = [math.exp(each) for each in logs]
        base = [each / math.fsum(base) for each in base]
        best = math.fsum(k * q for k, q in zip(worth, pmf(base, worth, math.exp(rate * m)), strict=True)) / m
        low, high = p, 1 - 1e-12  # the tilted policy is i.i.d. again: Bernoulli(q) with KL(q || p) = rate
        for _ in range(100):
            q = (low + high) / 2
            spent = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
            low, high = (q, high) if spent < rate else (low, q)
        return low - best

    gaps = [gap(m) for m in (25, 100, 400)]  # for the same KL no policy has more than the tilt
    scaled = [each * m / math.log(m) for each, m in zip(gaps, (25, 100, 400), strict=True)]
    assert min(scaled) > 0 and max(scaled) < 1.05 * min(scaled)  # as log m / m


# --- the estimator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("by_proxy", [False, True])
def test_the_estimate_is_the_mean_over_all_subsets(n, by_proxy):
    generator = torch.Generator().manual_seed(n)
    scores = torch.randn(6, generator=generator, dtype=torch.float64).tolist()
    proxy = torch.randn(6, generator=generator, dtype=torch.float64).tolist() if by_proxy else scores
    subsets = list(combinations(range(6), n))
    best = [scores[max(subset, key=lambda index: proxy[index])] for subset in subsets]
    assert estimate(scores, n, proxy) == pytest.approx(math.fsum(best) / len(subsets), abs=1e-14)


def test_equal_proxies_count_alike():
    """As where one of the best of each subset is kept by chance."""
    scores, proxy = [1.0, 2.0, 4.0, 8.0, 16.0], [0.0, 1.0, 1.0, 1.0, 0.0]
    total = []
    for subset in combinations(range(5), 3):
        top = max(proxy[index] for index in subset)
        best = [scores[index] for index in subset if proxy[index] == top]
        total.append(math.fsum(best) / len(best))
    assert estimate(scores, 3, proxy) == pytest.approx(math.fsum(total) / len(total), abs=1e-14)


@pytest.mark.parametrize(("size", "n"), [(2000, 7), (2000, 1000), (2000, 2000), (5000, 1)])
def test_the_weights_are_those_of_exact_integers(size, n):
    """Each of the up to N steps of the recurrence rounds twice."""
    scores = [math.sin(index) for index in range(size)]
    order = sorted(scores)
    total = math.comb(size, n)
    weights = [Fraction(math.comb(index, n - 1), total) for index in range(size)]
    exact = float(sum(weight * Fraction(score) for weight, score in zip(weights, order, strict=True)))
    assert estimate(scores, n) == pytest.approx(exact, abs=2 * size * 2**-53)


def test_no_number_of_samples_is_too_large():
    """10^5 scores i / N: the best of n has (N + 1) n / (n + 1) / N on average."""
    size, n = 10**5, 400
    found = estimate([(index + 1) / size for index in range(size)], n)
    assert found == pytest.approx((size + 1) * n / (n + 1) / size, abs=2 * size * 2**-53)


def test_the_estimate_is_the_pmf_on_average():
    """Over all draws of 4 samples, weighted by probability, the estimate for n = 2 is E under the pmf of n = 2."""
    probabilities, rewards = distribution(3, seed=4)
    draws = product(range(3), repeat=4)
    mean = math.fsum(
        math.prod(probabilities[i] for i in drawn) * estimate([rewards[i] for i in drawn], 2) for drawn in draws
    )
    best = pmf(probabilities, rewards, 2)
    assert mean == pytest.approx(math.fsum(q * r for q, r in zip(best, rewards, strict=True)), abs=1e-13)


# --- the decoder, and bad input -------------------------------------------------------------------------------------


def test_the_weighted_sum_decides_and_the_first_of_equals_stays():
    request = Request({"helpful": 0.25, "harmless": 0.75})
    rewards = torch.tensor([[4.0, 0.0], [0.0, 2.0], [6.0, 0.0]], dtype=torch.float64)
    assert BestOfN(n=3).keep(request, rewards) == 1
    assert BestOfN(n=3).keep(Request({"helpful": 1.0, "harmless": 0.0}), rewards) == 2
    assert BestOfN(n=3).keep(request, torch.ones(3, 2, dtype=torch.float64)) == 0


def test_what_is_unknown_is_not_chosen_unless_it_carries_no_weight():
    nan = math.nan
    rewards = torch.tensor([[nan, 5.0], [1.0, 0.0], [0.0, nan]], dtype=torch.float64)
    assert BestOfN(n=3).keep(Request({"helpful": 0.5, "harmless": 0.5}), rewards) == 1
    assert BestOfN(n=3).keep(Request({"helpful": 0.0, "harmless": 1.0}), rewards) == 0
    with pytest.raises(DataError, match="unknown for all of the sampled responses"):
        BestOfN(n=1).keep(Request({"helpful": 1.0, "harmless": 0.0}), rewards[:1])


def test_bad_input_is_refused():
    with pytest.raises(PreferenceError, match="needs an objective with weight"):
        BestOfN().speakers(Request())
    with pytest.raises(ConfigError, match=r"their sum, 0\.5, is 1"):
        pmf([0.5], [1.0], 2)
    with pytest.raises(ConfigError, match="a finite reward"):
        pmf([0.5, 0.5], [1.0, math.inf], 2)
    for scores, n in ((4, 5), (4, 0)):
        with pytest.raises(ConfigError, match=f"the best of {n}: from at least {n} scores"):
            estimate([0.0] * scores, n)
    with pytest.raises(ConfigError, match="must be finite"):
        estimate([0.0, math.nan], 1)

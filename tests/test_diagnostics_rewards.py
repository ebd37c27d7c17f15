"""Curves over KL, distances of rewards, bounds by proxies, balance, length, alarms: closed forms and planted optima."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moalign.diagnostics import balance, lengths, mismatch, overoptimisation, proxies, starc
from moalign.diagnostics.mismatch import Series
from moalign.diagnostics.overoptimisation import Curve
from moalign.diagnostics.prompts import within
from moalign.errors import MoalignError

RNG = np.random.default_rng(1)


# --- reward over sqrt(KL) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(2.0, 1.0), (0.5, 0.2), (1.0, 3.0)])
def test_a_planted_curve_is_found_with_its_peak(a, b):
    x = np.linspace(0.1, 6, 12)
    curve, note = overoptimisation.fit([0.0, *x], [0.0, *(x * (a - b * np.log(x)))])
    assert (curve.a, curve.b, curve.points) == (pytest.approx(a), pytest.approx(b), 12)
    assert curve.residual < 1e-9 and curve([0.0])[0] == 0.0
    peak = curve.peak
    assert peak == pytest.approx(math.exp(a / b - 1)) and curve([peak])[0] == pytest.approx(b * peak)
    assert curve([peak])[0] > max(curve([0.99 * peak])[0], curve([1.01 * peak])[0])
    assert "among the points" in note or "extrapolated" in note


def test_least_squares_leaves_nothing_along_its_columns():
    x, y = RNG.uniform(0.1, 5, 30), RNG.normal(size=30)
    curve, _ = overoptimisation.fit(x, y)
    rest = curve(x) - y
    assert abs(rest @ x) < 1e-9 and abs(rest @ (x * np.log(x))) < 1e-9
    assert curve.residual == pytest.approx(np.sqrt(np.mean(rest**2)))


def test_what_says_nothing_of_a_peak_is_said():
    note = overoptimisation.fit([0.0, 1.0, 2.0], [0.0, 1.0, 1.5])[1]
    assert note == "too few points away from the reference: 2, and a curve takes 3"
    assert overoptimisation.fit([1.0, 1.0, 1.0], [0.0, 1.0, 1.5])[0] is None
    curve, note = overoptimisation.fit([1.0, 2.0, 3.0], [1.0, 4.0, 9.0])
    assert curve.b < 0 and curve.peak is None and "no peak" in note
    assert "beyond all points" in overoptimisation.fit([0.1, 0.2, 0.3], Curve(2.0, 1.0, 0.0, 3)([0.1, 0.2, 0.3]))[1]
    assert Curve(1e4, 1.0, 0.0, 3).peak is None


@pytest.mark.parametrize(("a", "b"), [(-1.0, -0.3), (-3.0, 0.5)], ids=["without a peak", "whose peak is at hand"])
def test_reward_that_falls_everywhere_is_over_optimised(a, b):
    x = np.linspace(0.5, 3, 6)
    curve, note = overoptimisation.fit(x, Curve(a, b, 0.0, 6)(x))
    assert (curve(x) < 0).all() and "all of it is over-optimised" in note
    assert "all of it" not in overoptimisation.fit(x, -Curve(a, b, 0.0, 6)(x))[1]


# --- STARC ----------------------------------------------------------------------------------------------------------


def test_nothing_that_no_policy_can_change_counts():
    prompts = np.repeat(np.arange(10), 6).tolist()
    rewards = RNG.normal(size=(60, 2))
    moved = rewards.copy()
    moved[:, 0] = 7.5 * rewards[:, 0] + np.repeat(RNG.normal(size=10), 6)
    np.testing.assert_allclose(starc.distances(moved, prompts), starc.distances(rewards, prompts), atol=1e-12)
    both = np.stack([rewards[:, 0], moved[:, 0]], axis=1)
    np.testing.assert_allclose(starc.distances(both, prompts), 0, atol=1e-7)  # a root of rounding
    by_prompt = np.stack([rewards[:, 0], rewards[:, 0] * np.repeat(RNG.uniform(0.1, 5, 10), 6)], axis=1)
    assert starc.distances(by_prompt, prompts)[0, 1] > 0.05, "a factor for each prompt asks for another trade-off"


def test_the_distance_is_that_of_the_correlation_and_the_opposite_is_farthest():
    prompts = np.repeat(np.arange(5), 8).tolist()
    one, other = RNG.normal(size=(2, 40))
    found = starc.distances(np.stack([one, other, -one], axis=1), prompts)
    r = np.corrcoef(within(np.stack([one, other], 1), prompts).T)[0, 1]
    assert found[0, 1] == pytest.approx(math.sqrt((1 - r) / 2))
    assert found[0, 2] == pytest.approx(1) and found[1, 0] == found[0, 1] and found.max() <= 1 + 1e-12


def test_trivial_rewards():
    prompts = [0, 0, 1, 1]
    flat, by_prompt = np.full(4, 0.1), np.array([1.0, 1.0, 5.0, 5.0])
    found = starc.distances(np.stack([flat, by_prompt, [0.0, 1.0, 0.0, 1.0]], axis=1), prompts)
    assert found[0, 1] == 0.0 and found[0, 2] == found[1, 2] == 0.5


# --- proxies --------------------------------------------------------------------------------------------------------


def test_the_bound_is_never_violated():
    """2,000 problems of a few responses each, enumerated; in some the two rewards are nearly the same."""
    tightest = math.inf
    for problem in range(2000):
        size = int(RNG.integers(2, 8))
        reference, policy = RNG.dirichlet(np.full(size, 0.7), 2) + 1e-9
        reference, policy = reference / reference.sum(), policy / policy.sum()
        proxy = RNG.normal(size=size)
        gold = proxy * RNG.normal() + RNG.normal(size=size) * 10.0 ** RNG.uniform(-6, 1)
        mean_r, mean_g = reference @ proxy, reference @ gold
        sd_r, sd_g = math.sqrt(reference @ (proxy - mean_r) ** 2), math.sqrt(reference @ (gold - mean_g) ** 2)
        if min(sd_r, sd_g) < 1e-6:
            continue
        rho = float(np.clip(reference @ ((proxy - mean_r) * (gold - mean_g)) / (sd_r * sd_g), -1, 1))
        chi2, kl = float(policy @ (policy / reference)) - 1, float(policy @ np.log(policy / reference))
        assert chi2 >= math.expm1(kl) - 1e-9 >= kl - 1e-8, problem
        least = proxies.least_gain(rho, float(policy @ proxy - mean_r) / sd_r, math.sqrt(max(0.0, chi2)))
        slack = float(policy @ gold - mean_g) / sd_g - least
        assert slack >= -1e-6 * (1 + math.sqrt(max(0.0, chi2))), problem
        tightest = min(tightest, slack)
    assert tightest < 1e-3, "it is met with equality somewhere, so it is no loose bound"


def test_two_gaussians_have_the_closed_form():
    """pi = N(m, 1), pi_ref = N(0, 1): log-ratio m y - m^2 / 2, chi2 = exp(m^2) - 1, KL = m^2 / 2."""
    m, number = 0.5, 200_000
    y = np.random.default_rng(3).normal(m, 1, number)
    ratios = m * y - m * m / 2
    found = proxies.chi_squared(ratios, np.arange(number).tolist())
    assert abs(found.value - math.expm1(m * m)) < 4 * found.stderr < 0.05
    # of L under pi: E L = exp(m^2), E L^2 = exp(3 m^2)
    assert found.stderr == pytest.approx(math.sqrt((math.exp(3 * m * m) - math.exp(2 * m * m)) / number), rel=0.1)
    assert found.effective / number == pytest.approx(math.exp(-m * m), rel=0.05)
    assert found.value > math.expm1(ratios.mean()) > ratios.mean() and not found.dominated
    assert found.root == pytest.approx(math.sqrt(found.value))


def test_far_policies_stay_within_numbers_and_are_called_few():
    ratios = np.array([1200.0, 3.0, 2.0] * 20)
    found = proxies.chi_squared(ratios, list(range(60)))
    assert found.value == math.inf and found.log_second == pytest.approx(1200 - math.log(3))
    assert found.root == pytest.approx(math.exp(found.log_second / 2)) and found.stderr == math.inf
    assert found.effective == pytest.approx(20) and not found.dominated
    one = proxies.chi_squared([50.0] + [0.0] * 99, list(range(100)))
    assert one.dominated and one.effective == pytest.approx(1) and one.largest == pytest.approx(1)
    same = proxies.chi_squared(np.zeros(30), list(range(30)))
    assert same.value == 0.0 == same.stderr == same.root and same.effective == pytest.approx(30)
    assert proxies.chi_squared([0.1, 0.2], [0, 0]).stderr is None


def test_kinship_is_that_within_prompts():
    prompts = np.repeat(np.arange(400), 5).tolist()
    shift = np.repeat(RNG.normal(0, 10, 400), 5)  # between prompts both go together, within them against each other
    one = RNG.normal(size=2000)
    found = proxies.kinship(one + shift, -2 * one + shift, prompts)
    assert found.rho == pytest.approx(-1) and found.gold_deviation == pytest.approx(2 * found.proxy_deviation)
    assert found.proxy_deviation == pytest.approx(1, rel=0.06)
    assert proxies.kinship([1.0, 2.0], [1.0, 2.0], [0, 1]) is None
    assert proxies.least_gain(1.0, 2.0, math.inf) == 2.0


def test_what_is_constant_within_prompts_but_for_rounding_has_no_kin():
    prompts = np.repeat(np.arange(100), 3).tolist()
    flat = np.repeat(RNG.normal(0, 10, 100), 3)
    assert 0 < np.abs(within(flat[:, None], prompts)).max() < 1e-13, "a mean of three equal numbers may be another one"
    one = RNG.normal(size=300)
    assert proxies.kinship(flat, one, prompts) is None and proxies.kinship(one, flat, prompts) is None
    small = proxies.kinship(1e-12 * one, one, prompts)
    assert small is not None and small.rho == pytest.approx(1), "small is not trivial"


# --- balance --------------------------------------------------------------------------------------------------------


def test_enough_right_ones_and_nothing_else_is_1():
    assert balance.score([8, 20], [8, 20]) == 1.0
    assert balance.score([4], [4]) == 0.5 and balance.score([16], [8]) == 0.5 and balance.score([0], [0]) == 0.0
    assert balance.score([4, 4], [4, 2], wished=4) == pytest.approx((1 + 0.5 * 0.5) / 2)
    for bad in (([1], [2]), ([], []), ([1], [-1])):
        with pytest.raises(MoalignError):
            balance.score(*bad)


def test_a_planted_threshold_is_found():
    """Of each prompt 8 right answers with a reward above 0.6, 8 wrong ones below: keep from the least right one on."""
    rewards = np.tile(np.concatenate([np.linspace(0.6, 0.9, 8), np.linspace(0.0, 0.5, 8)]), 3)
    correct = np.tile(np.arange(16) < 8, 3)
    prompts, answers = np.repeat(np.arange(3), 16).tolist(), [str(number % 16) for number in range(48)]
    swept = balance.sweep(rewards, correct, prompts, answers, balance.grid(rewards))
    assert balance.best(swept) == (pytest.approx(0.6), 1.0)
    assert dict(swept)[0.0] == 0.5 and len(swept) == 16
    assert balance.best([(0.5, 0.2), (0.1, 0.2), (0.9, 0.1)]) == (0.1, 0.2)
    many = balance.grid(RNG.normal(size=500))
    assert len(many) == 41 and many == sorted(many)


def test_what_is_said_twice_counts_once():
    kept, right = balance.counts([1.0, 1.0, 0.0, 1.0], [True, True, True, False], [0, 0, 0, 1], list("aabc"), 0.5)
    assert kept.tolist() == [1, 1] and right.tolist() == [1, 0]


# --- length ---------------------------------------------------------------------------------------------------------


def test_lengths_and_a_planted_slope():
    found = lengths.lengths([2, 4, 6], [True, False, True])
    assert (found.mean, found.deviation) == (4.0, 2.0) and found.truncated == pytest.approx(1 / 3)
    assert lengths.lengths([3], [True]).deviation is None
    prompts = np.repeat(np.arange(50), 4).tolist()
    tokens = RNG.integers(1, 40, 200).astype(float)
    shift = np.repeat(RNG.normal(0, 100, 50), 4)
    exact = lengths.slope(0.25 * tokens + shift, tokens, prompts)
    assert exact.value == pytest.approx(0.25) and exact.share == pytest.approx(1) and exact.stderr < 1e-9
    noisy = lengths.slope(RNG.normal(size=200) + shift, tokens, prompts)
    assert abs(noisy.value) < 4 * noisy.stderr and noisy.share < 0.1
    assert lengths.slope(tokens, np.ones(200), prompts) is None
    gap = np.where(np.arange(200) < 8, np.nan, 0.25 * tokens + shift)
    assert lengths.slope(gap, tokens, prompts).value == pytest.approx(0.25)


def test_the_slopes_error_is_that_of_many_draws():
    """The mean of the stated errors is the deviation of the slopes, where the noise grows with length."""
    rng = np.random.default_rng(5)
    prompts, tokens = np.repeat(np.arange(60), 3).tolist(), rng.integers(1, 30, 180).astype(float)
    found = [lengths.slope(rng.normal(size=180) * tokens, tokens, prompts) for _ in range(400)]
    assert np.mean([each.stderr for each in found]) == pytest.approx(np.std([each.value for each in found]), rel=0.12)


# --- alarms ---------------------------------------------------------------------------------------------------------


def test_a_run_that_games_its_reward_raises_the_alarm():
    steps = np.linspace(0, 1, 200)
    noise = np.random.default_rng(2).normal(0, 0.02, (2, 200))
    proxy, gold = mismatch.blocks(steps + noise[0]), mismatch.blocks(4 * steps * (1 - steps) + noise[1])
    raised = mismatch.alarm(proxy, gold)
    assert raised is not None and raised.start in (3, 4) and raised.end == 7
    assert raised.rise > 0.3 and raised.fall > 0.5
    assert mismatch.alarm(proxy, proxy) is None and mismatch.alarm(proxy, mismatch.blocks(noise[1])) is None
    assert mismatch.alarm(mismatch.blocks(noise[0]), gold) is None, "the proxy stands still"


def test_chance_raises_no_alarm():
    assert mismatch.alarm(Series.of([0.0, 1.0]), Series.of([1.0, 0.0])) == mismatch.Alarm(0, 1, 1.0, 1.0)
    assert mismatch.alarm(Series.of([0.0, 1.0], [0.5, 0.5]), Series.of([1.0, 0.0])) is None
    assert mismatch.alarm(Series.of([0.0, 1.0]), Series.of([1.0, 0.0], [0.4, None])) == mismatch.Alarm(0, 1, 1.0, 1.0)
    assert mismatch.alarm(Series.of([0.0]), Series.of([1.0])) is None
    short = mismatch.blocks([1.0, 2.0, 3.0])
    assert len(short.values) == 1 and short.errors[0] == pytest.approx(1 / math.sqrt(3))


@pytest.mark.parametrize("points", [2, 8, 30])
def test_that_the_best_point_is_looked_for_is_reckoned_with(points):
    """The first figure surely rises and the second stands still: 1 in 40 at the most, here 3 deviations of the 2,000
    draws above it. A limit of 1.96 whatever the number of points gives 11 % with 8."""
    rng, drawn = np.random.default_rng(5), 2000
    rising, errors = Series.of(np.arange(points) * 1e3, np.ones(points)), np.ones(points)
    raised = [mismatch.alarm(rising, Series.of(rng.normal(size=points), errors)) is not None for _ in range(drawn)]
    assert 0.002 < np.mean(raised) <= 0.035

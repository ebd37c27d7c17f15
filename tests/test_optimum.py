"""What the best policy would reach, from a policy's own samples: against enumeration of a small world."""

from __future__ import annotations

import numpy as np
import pytest

from moalign.engine.optimum import optimum

PRICE = 0.3
REWARDS = np.array([[0.0, 0.2, 0.5, 0.9, 1.0], [0.7, 0.1, 0.3, 0.0, 0.4]])  # two prompts, five replies
REFERENCE = np.log(np.array([[0.4, 0.3, 0.2, 0.05, 0.05], [0.1, 0.2, 0.3, 0.2, 0.2]]))
TRUE = PRICE * np.log((np.exp(REFERENCE) * np.exp(REWARDS / PRICE)).sum(1)).mean()


def tilted(strength):
    """Log-probabilities of pi ~ pi_ref exp(strength r / price); strength 1 is the best policy."""
    logits = REFERENCE + strength * REWARDS / PRICE
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def estimate(policy, samples, rng):
    rewards, ratios, prompts = [], [], []
    for prompt, logps in enumerate(policy):
        drawn = rng.choice(len(logps), samples, p=np.exp(logps) / np.exp(logps).sum())
        rewards += REWARDS[prompt, drawn].tolist()
        ratios += (logps - REFERENCE[prompt])[drawn].tolist()
        prompts += [prompt] * samples
    return optimum(np.array(rewards), np.array(ratios), prompts, PRICE)


def test_the_best_policy_knows_the_optimum_from_any_four_samples():
    found = estimate(tilted(1.0), 4, np.random.default_rng(0))
    assert found.value == pytest.approx(TRUE, abs=1e-12) and found.stderr == pytest.approx(0, abs=1e-12)
    assert found.bound == pytest.approx((TRUE, 0), abs=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.3])
def test_other_policies_estimate_it_without_bias_and_know_their_error(strength):
    rng, tries = np.random.default_rng(1), 600
    found = [estimate(tilted(strength), 24, rng) for _ in range(tries)]
    values, errors = np.array([each.value for each in found]), np.array([each.stderr for each in found])
    # of the mean over the tries: four of its standard errors, and the jackknife leaves a bias of the order 1 / n^2
    assert abs(values.mean() - TRUE) < 4 * values.std() / np.sqrt(tries) + PRICE / 24**2
    assert 0.8 < errors.mean() / values.std() < 1.25
    bounds = np.array([each.bound[0] + 3 * each.bound[1] for each in found])
    assert np.mean(bounds < TRUE) < (0.02 if strength else 0.04)  # what the base rarely says weighs most


def test_a_better_policy_has_the_smaller_error():
    errors = [estimate(tilted(strength), 40, np.random.default_rng(2)).stderr for strength in (0.0, 0.5, 0.9)]
    assert errors[0] > errors[1] > errors[2]


def test_the_log_mean_is_that_of_the_whole_prompt_where_all_samples_are_alike():
    found = optimum(np.full(8, 0.5), np.zeros(8), [0] * 4 + [1] * 4, 0.1)
    assert (found.value, found.stderr) == (pytest.approx(0.5), 0.0)


def test_huge_exponents_do_not_overflow():
    found = optimum(np.repeat([1000.0, -1000.0], 4), np.zeros(8), [0] * 4 + [1] * 4, 1e-3)
    assert found.value == pytest.approx(0.0)
    far = optimum(np.array([0.0, 8.0, 3.0, 1.0]), np.zeros(4), [0, 0, 0, 0], 0.01)  # exp(-800) is 0 as a float
    assert np.isfinite([far.value, far.stderr, *far.bound, far.deviation, far.reached]).all()


@pytest.mark.parametrize("deviation", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("prompts", "samples"), [(8, 4), (40, 4), (8, 16)])
def test_of_normal_exponents_the_bound_is_rarely_missed_however_far_the_policy_is(prompts, samples, deviation):
    """log E exp g is half the variance. The logarithm of the mean alone is too low in up to 8 of 10 evaluations."""
    rng, tries = np.random.default_rng(4), 200
    asked, none = np.repeat(np.arange(prompts), samples), np.zeros(prompts * samples)
    found = [optimum(rng.normal(0, deviation, len(none)), none, asked, 1.0) for _ in range(tries)]
    bounds = np.array([each.bound[0] + 3 * each.bound[1] for each in found])
    assert np.mean(bounds < deviation**2 / 2) < 0.02 + 3 * np.sqrt(0.02 * 0.98 / tries)
    assert np.mean([each.deviation for each in found]) == pytest.approx(deviation, rel=0.05)
    assert np.mean([each.reached for each in found]) == pytest.approx(deviation / np.sqrt(len(none)), rel=0.05)


@pytest.mark.parametrize(
    ("rewards", "prompts", "price"),
    [([1.0] * 7, [0] * 4 + [1] * 3, 0.1), ([1.0, 1.0, 1.0, np.nan], [0] * 4, 0.1), ([1.0] * 4, [0] * 4, 0.0)],
    ids=["a prompt with three samples", "a sample without a reward", "no price"],
)
def test_nothing_is_said_where_nothing_can_be(rewards, prompts, price):
    assert optimum(np.array(rewards), np.zeros(len(rewards)), prompts, price) is None

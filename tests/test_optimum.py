"""What the best policy would reach, from a policy's own samples: against enumeration of a small world."""

from __future__ import annotations

import numpy as np
import pytest

from moalign.engine.optimum import RELIABLE, optimum

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


def test_the_best_policy_knows_the_optimum_from_any_two_samples():
    found = estimate(tilted(1.0), 2, np.random.default_rng(0))
    assert found.value == pytest.approx(TRUE, abs=1e-12) and found.stderr == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.3])
def test_other_policies_estimate_it_without_bias_and_know_their_error(strength):
    rng, tries = np.random.default_rng(1), 600
    found = [estimate(tilted(strength), 24, rng) for _ in range(tries)]
    values, errors = np.array([each.value for each in found]), np.array([each.stderr for each in found])
    # of the mean over the tries: four of its standard errors, and the jackknife leaves a bias of the order 1 / n^2
    assert abs(values.mean() - TRUE) < 4 * values.std() / np.sqrt(tries) + PRICE / 24**2
    assert 0.8 < errors.mean() / values.std() < 1.25
    reliable = np.array([each.reliable for each in found])
    missed = np.mean((values + 3 * errors < TRUE) & reliable)
    assert missed < (0.02 if strength else 0.05)  # what the base rarely says weighs most: its errors are skewed


def test_a_better_policy_has_the_smaller_error():
    errors = [estimate(tilted(strength), 40, np.random.default_rng(2)).stderr for strength in (0.0, 0.5, 0.9)]
    assert errors[0] > errors[1] > errors[2]


def test_the_log_mean_is_that_of_the_whole_prompt_where_all_samples_are_alike():
    found = optimum(np.full(6, 0.5), np.zeros(6), [0, 0, 0, 1, 1, 1], 0.1)
    assert (found.value, found.stderr) == (pytest.approx(0.5), 0.0)


def test_huge_exponents_do_not_overflow():
    found = optimum(np.array([1000.0, 1000.0, -1000.0, -1000.0]), np.zeros(4), [0, 0, 1, 1], 1e-3)
    assert found.value == pytest.approx(0.0)
    far = optimum(np.array([0.0, 8.0, 3.0, 1.0]), np.zeros(4), [0, 0, 0, 0], 0.01)  # exp(-800) is 0 as a float
    assert np.isfinite([far.value, far.stderr, far.deviation, far.reached]).all() and not far.reliable


@pytest.mark.parametrize("samples", [4, 8, 16])
@pytest.mark.parametrize("prompts", [8, 40])
def test_where_it_claims_to_be_reliable_few_bounds_are_missed_even_where_samples_vary_most(samples, prompts):
    """Normal exponents of the largest variance that passes: log E exp g is half of it."""
    rng, tries, variance = np.random.default_rng(4), 300, RELIABLE * np.log(samples)
    asked = np.repeat(np.arange(prompts), samples)
    found = []
    for _ in range(tries):
        exponents = rng.normal(0, np.sqrt(variance), prompts * samples)
        found.append(optimum(exponents, np.zeros(len(exponents)), asked, 1.0))
    missed = np.mean([each.reliable and each.value + 3 * each.stderr < variance / 2 for each in found])
    assert missed < 0.05 + 3 * np.sqrt(0.05 * 0.95 / tries)
    nearer = optimum(rng.normal(0, 0.3, prompts * samples), np.zeros(prompts * samples), asked, 1.0)
    assert nearer.reliable and nearer.deviation == pytest.approx(0.3, rel=0.5)
    assert nearer.reached == pytest.approx(0.3 / np.sqrt(prompts * samples), rel=0.5)


def test_three_samples_are_too_few():
    assert not optimum(np.zeros(3), np.zeros(3), [0, 0, 0], 1.0).reliable
    assert optimum(np.zeros(4), np.zeros(4), [0, 0, 0, 0], 1.0).reliable


@pytest.mark.parametrize(
    ("rewards", "prompts", "price"),
    [([1.0, 2.0, 3.0], [0, 0, 1], 0.1), ([1.0, np.nan], [0, 0], 0.1), ([1.0, 2.0], [0, 0], 0.0)],
    ids=["a prompt with one sample", "a sample without a reward", "no price"],
)
def test_nothing_is_said_where_nothing_can_be(rewards, prompts, price):
    assert optimum(np.array(rewards), np.zeros(len(rewards)), prompts, price) is None

"""RAPO as mathematics: its anchor, the gradient of the forward KL from it, and that of the sampled estimate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tabular import DIE, EVEN, MORE_REWARDS, Situation, on_policy
from torch import Tensor

from moalign.testing import check_objective
from moalign_plugins.objectives.grpo import GRPO
from moalign_plugins.objectives.rapo import RAPO

EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1


def silent(world: Situation, reward: float) -> Situation:
    """All rewards are the same, so that nothing but the KL is left."""
    return replace(world, rewards=torch.full_like(world.rewards, reward))


@pytest.mark.parametrize("options", [{}, {"entropy": 0.1}, {"flattest": 1.0, "length": "none"}])
def test_it_conforms(options):
    check_objective(RAPO(beta=0.3, **options))


# --- the anchor -----------------------------------------------------------------------------------------------------


def test_the_exponent_rises_from_the_flattest_to_1():
    signal = torch.tensor([-5.0, -1.0, 0.0, 1.0, 3.0, 9.0], dtype=torch.float64)
    found = RAPO(flattest=0.2, worst=-1.0, best=3.0).exponent(signal).tolist()
    assert found == pytest.approx([0.2, 0.2, 0.4, 0.6, 1.0, 1.0])
    with pytest.raises(ValidationError, match=r"worst \(1\) has to be below best \(1\)"):
        RAPO(worst=1.0)


@pytest.mark.parametrize("reward", [0.0, 0.3, 1.0])
def test_the_kl_is_that_of_a_reference_at_a_temperature(reward):
    """Logits times phi, with phi 0.5, 0.65 and 1; from beginnings as the policy goes there."""
    world = silent(on_policy(EVEN, MORE_REWARDS), reward)
    tempered = replace(world, reference=(0.5 + 0.5 * reward) * world.reference)
    found = world.expected_gradient(RAPO(beta=1.0, length="none"), 1)
    torch.testing.assert_close(found, world.gradient(tempered.divergence_of_tokens(forward=True)), **EXACT)
    if reward < 1:
        assert (found - world.gradient(world.divergence_of_tokens(forward=True))).abs().max() > 1e-2


def test_each_response_has_the_anchor_of_its_own_reward():
    """The anchors' mean, by the probability of each face, is what the policy is drawn to."""
    world = on_policy(DIE)
    p, logits = world.policy.detach().softmax(-1), world.reference.detach()
    exponents = 0.1 + 0.9 * world.rewards.clamp(0, 1)
    anchors = torch.stack([(phi * logits).softmax(-1) for phi in exponents])
    found = world.expected_gradient(RAPO(beta=1.0, flattest=0.1, length="none"), 1)
    torch.testing.assert_close(found, p - p @ anchors, **EXACT)


@pytest.mark.parametrize("size", [2, 3])
def test_with_the_reference_itself_its_expected_gradient_is_that_of_grpo_with_the_forward_kl(size):
    world = on_policy(EVEN, MORE_REWARDS) if size == 2 else on_policy(DIE)
    expected = world.expected_gradient(GRPO(beta=0.7, kl="forward", length="none"), size)
    plain = RAPO(beta=0.7, flattest=1.0, length="none")
    torch.testing.assert_close(world.expected_gradient(plain, size), expected, **EXACT)
    good = replace(world, rewards=world.rewards + 10)  # all of them above the best
    tempered = RAPO(beta=0.7, length="none")
    torch.testing.assert_close(good.expected_gradient(tempered, size), expected, **EXACT)
    assert (world.expected_gradient(tempered, size) - expected).abs().max() > 1e-2


def test_divided_by_lengths_the_sampled_estimate_is_biased_and_the_exact_one_is_not():
    """By hand: the KL of each token, times the mean of 1 / |y| over the responses that go through its state."""
    world = silent(on_policy(EVEN, MORE_REWARDS), 1.0)
    own, reference = (table.log_softmax(-1) for table in (world.policy.view(3, 3), world.reference.detach().view(3, 3)))
    visited = torch.zeros(3, dtype=torch.float64)
    for probability, response in zip(EVEN.logps(world.policy).sum(-1).exp().tolist(), EVEN.responses, strict=True):
        for state, _ in response:
            visited[state] += probability / len(response)
    expected = world.gradient((visited * (reference.exp() * (reference - own)).sum(-1)).sum())
    torch.testing.assert_close(world.expected_gradient(RAPO(beta=1.0), 1), expected, **EXACT)
    sampled = world.expected_gradient(GRPO(beta=1.0, kl="forward"), 1)
    assert (sampled - expected).abs().max() > 1e-2


def test_the_bonus_is_that_of_grpo():
    world = on_policy(DIE)
    plain, with_bonus = (world.expected_gradient(RAPO(entropy=entropy, length="none"), 2) for entropy in (0.0, 0.7))
    torch.testing.assert_close(with_bonus - plain, -0.7 * world.gradient(world.entropy_of_tokens()), **EXACT)


# --- the trap -------------------------------------------------------------------------------------------------------


def test_the_sampled_estimate_has_the_right_mean_and_the_gradient_of_another_thing():
    """Where the ratio in front of it is held fixed, (1 - u) log pi, as k3 does, the gradient is right."""
    world = on_policy(DIE)
    forward = world.divergence_of_tokens(forward=True)

    def log_u() -> Tensor:
        return DIE.logps(world.reference.detach()).sum(-1) - DIE.logps(world.policy).sum(-1)

    p, u = world.policy.detach().softmax(-1), log_u().exp()
    estimate = (p * (u * log_u() - u + 1)).sum()
    torch.testing.assert_close(estimate, forward, **EXACT)
    wrong, right = world.gradient(estimate), world.gradient(forward)
    assert (wrong - right).abs().max() > 0.1
    fixed = (p * (1 - u.detach()) * DIE.logps(world.policy).sum(-1)).sum()
    k3 = (p * (log_u().exp() - 1 - log_u())).sum()
    own = silent(world, 1.0).expected_gradient(RAPO(beta=1.0), 1)
    for found in (world.gradient(fixed), world.gradient(k3), own):
        torch.testing.assert_close(found, right, **EXACT)

"""Distribution matching as mathematics: values and gradients of its divergences by enumeration, where it comes to rest,
what an estimated Z costs, and moments as constraints."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tabular import DIE, SPEECH, Language, Situation, on_policy
from torch import Tensor

from moalign.api import PluginError, Preference, Round
from moalign.testing import check_objective
from moalign_plugins.combiners.lagrangian import Lagrangian
from moalign_plugins.objectives.distribution_matching import SLOPES, TERMS, DistributionMatching, mean_of_others
from moalign_plugins.objectives.reinforce import REINFORCE
from moalign_plugins.objectives.rloo import RLOO

BETA = 0.6
EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1
NAMES = list(TERMS)


def target(world: Situation, beta: float = BETA) -> Tensor:
    """log of pi_ref exp(r / beta) / Z of each response; [R]."""
    return (world.language.logps(world.reference.detach()).sum(-1) + world.rewards / beta).log_softmax(-1)


def by_definition(name: str, log_pi: Tensor, log_p: Tensor) -> Tensor:
    pi, p = log_pi.exp(), log_p.exp()
    middle = ((pi + p) / 2).log()
    return {
        "forward-kl": lambda: (p * (log_p - log_pi)).sum(),
        "reverse-kl": lambda: (pi * (log_pi - log_p)).sum(),
        "js": lambda: (p * (log_p - middle)).sum() + (pi * (log_pi - middle)).sum(),
        "tv": lambda: (pi - p).abs().sum() / 2,
        "chi2": lambda: ((pi - p) ** 2 / pi).sum(),
    }[name]()


def log_policy(world: Situation) -> Tensor:
    return world.language.logps(world.policy).sum(-1)


@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_it_conforms(name, baseline):
    check_objective(DistributionMatching(divergence=name, baseline=baseline, beta=0.5))


# --- the divergences, with the exact Z ------------------------------------------------------------------------------


@pytest.mark.parametrize("language", [SPEECH, DIE])
@pytest.mark.parametrize("sampler", ["the policy", "another policy"])
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_the_sampler_is_the_divergence_and_its_gradient(name, sampler, language):
    world = on_policy(language)
    log_q = log_policy(world).detach() if sampler == "the policy" else language.logps(language.parameters(7)).sum(-1)
    log_q, log_p = log_q.detach(), target(world)
    value = (log_q.exp() * TERMS[name](log_policy(world) - log_q, log_p - log_q)).sum()
    expected = by_definition(name, log_policy(world), log_p)
    torch.testing.assert_close(value, expected, **EXACT)
    slope = world.gradient(expected)
    torch.testing.assert_close(world.gradient(value), slope, **EXACT)
    assert slope.abs().max() > 1e-2
    log_t = (log_policy(world) - log_p).detach()
    pseudo = (log_policy(world).exp().detach() * SLOPES[name](log_t) * log_policy(world)).sum()
    torch.testing.assert_close(world.gradient(pseudo), slope, **EXACT)  # E over pi of f'(t) grad log pi


def test_each_is_a_divergence_of_its_own():
    world = on_policy(SPEECH)
    slopes = torch.stack([world.gradient(by_definition(name, log_policy(world), target(world))) for name in NAMES])
    slopes = slopes / slopes.norm(dim=1, keepdim=True)
    cosines = slopes @ slopes.T - torch.eye(len(NAMES), dtype=torch.float64)
    assert cosines.max() < 0.999


# --- the loss, whose Z is of the group ------------------------------------------------------------------------------


def sampled_from_target(language: Language) -> Situation:
    world = on_policy(language)
    return replace(world, sampler=language.fitted(target(world)))


# At t = 1, where the target is or has sampled, the slope of "tv" jumps, and rounding says to which side.
SMOOTH = [name for name in NAMES if name != "tv"]
FORMS = [(name, baseline) for name in SMOOTH for baseline in (True, False)]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("name", "baseline"), [*FORMS, ("tv", False)])
def test_where_the_target_sampled_the_expected_gradient_is_exact(name, baseline, size):
    """All weights p / q are 1, so that Z is known."""
    world = sampled_from_target(SPEECH)
    found = world.expected_gradient(DistributionMatching(beta=BETA, divergence=name, baseline=baseline), size)
    expected = world.gradient(by_definition(name, log_policy(world), target(world)))
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("size", [2, 3])
def test_the_reverse_kl_is_the_policy_gradient_with_the_kl_in_the_reward(size):
    """Over beta, response by response, whatever Z is estimated to be; so without bias."""
    world = on_policy(SPEECH)
    objective, rloo = DistributionMatching(beta=BETA, divergence="reverse-kl"), RLOO(beta=BETA)
    drawn = torch.tensor([[0, 2, 4][:size], [1, 1, 5][:size], [3, 0, 3][:size]])
    for rows in drawn:
        found, expected = (world.gradient(world.losses(each, rows[None]).sum()) for each in (objective, rloo))
        torch.testing.assert_close(BETA * found, expected, **EXACT)
    truth = -world.gradient(world.reward() - BETA * world.divergence())
    torch.testing.assert_close(BETA * world.expected_gradient(objective, size), truth, **EXACT)
    bare = DistributionMatching(beta=BETA, divergence="reverse-kl", baseline=False)
    assert (BETA * world.expected_gradient(bare, size) - truth).abs().max() > 1e-2


@pytest.mark.parametrize("name", [name for name in NAMES if name != "reverse-kl"])  # has none
def test_with_more_responses_the_estimate_of_z_costs_less_and_with_a_baseline_too(name):
    world = on_policy(DIE, beta_rewards(DIE))
    exact = world.gradient(by_definition(name, log_policy(world), target(world, 1.0)))
    with_baseline, without = (DistributionMatching(beta=1.0, divergence=name, baseline=each) for each in (True, False))
    errors = [float((world.expected_gradient(with_baseline, size) - exact).norm()) for size in (2, 3, 4, 5)]
    assert all(after < 0.97 * before for before, after in pairwise(errors)), errors
    assert errors[0] < float((world.expected_gradient(without, 2) - exact).norm())


def beta_rewards(language: Language) -> Tensor:
    return torch.linspace(0, 0.8, len(language.responses), dtype=torch.float64)


def test_what_a_prompt_adds_to_all_rewards_changes_nothing():
    world, drawn = on_policy(SPEECH), torch.tensor([[0, 2, 4], [1, 1, 5]])
    raised = replace(world, rewards=world.rewards + 4.0)
    for name in NAMES:
        objective = DistributionMatching(beta=BETA, divergence=name)
        torch.testing.assert_close(raised.losses(objective, drawn), world.losses(objective, drawn), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_a_response_that_the_target_all_but_excludes_is_a_number_in_single_precision(name):
    """Rewards of -1000 and 1000 times beta: weights of 0 and 2."""
    world = replace(on_policy(DIE), rewards=torch.tensor([-600.0, 600.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    losses = world.losses(DistributionMatching(beta=BETA, divergence=name), torch.tensor([[0, 1]]))
    assert bool(losses.isfinite().all()) and bool(world.gradient(losses.sum()).isfinite().all())


def test_what_the_others_have_on_average():
    values, groups = torch.tensor([1.0, 2.0, 6.0, 5.0]).double(), torch.tensor([3, 3, 3, 1])
    assert mean_of_others(values, groups).tolist() == [4.0, 3.5, 1.5, 0.0]


def test_what_is_not_declared_is_said():
    world = on_policy(DIE)

    class Forgetful(DistributionMatching):
        def loss(self, batch, terms):
            return super().loss(replace(batch, old_logps=None), terms)

    with pytest.raises(PluginError, match='"old_logps" in `needs`'):
        world.losses(Forgetful(), torch.tensor([[0, 1]]))


# --- where it comes to rest -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "baseline"), FORMS)
def test_at_the_target_no_group_moves_it(name, baseline):
    """With a baseline not a single one; without one none on average. A policy gradient without the KL goes on."""
    world = sampled_from_target(SPEECH)
    world = replace(world, policy=world.sampler)
    objective = DistributionMatching(beta=BETA, divergence=name, baseline=baseline)
    assert world.expected_gradient(objective, 2).abs().max() < 1e-12
    if baseline:
        for rows in ([0, 2], [1, 1], [4, 5]):
            assert world.gradient(world.losses(objective, torch.tensor([rows])).sum()).abs().max() < 1e-12
    assert world.expected_gradient(REINFORCE(beta=0.0), 2).abs().max() > 1e-2


def descended(world: Situation, objective, steps: int, rate: float) -> Tensor:
    """The policy's probabilities after so many steps, each from the policy's own samples."""
    for _ in range(steps):
        moved = (world.policy.detach() - rate * world.expected_gradient(objective, 2)).requires_grad_()
        world = replace(world, policy=moved, sampler=moved)
    return log_policy(world).exp().detach()


def test_it_leads_to_the_target_and_from_there_reward_alone_to_a_single_response():
    world = on_policy(DIE)
    found = descended(world, DistributionMatching(beta=BETA, divergence="reverse-kl"), 300, 0.5)
    torch.testing.assert_close(found, target(world).exp(), rtol=0, atol=1e-3)
    there = sampled_from_target(DIE)
    alone = descended(replace(there, policy=there.sampler), REINFORCE(beta=0.0), 300, 0.5)
    assert target(world).exp().max() < 0.9
    assert alone.argmax() == world.rewards.argmax() and alone.max() > 0.98


# --- moments as constraints -----------------------------------------------------------------------------------------


def test_multipliers_of_thresholds_find_the_distribution_with_those_moments():
    """The policy is at its target in each round. The second reward is to be 0.6, which it is not by itself. What is
    found has more of the first reward, less beta KL from the reference, than all others with that moment nearby.
    """
    reference = DIE.logps(DIE.parameters(1)).sum(-1).detach()
    rewards = torch.stack([torch.linspace(0, 1, 5), torch.tensor([0.9, 0.2, 0.5, 0.1, 0.0])], 1).double()
    bound, rule = 0.6, Lagrangian(rate=0.5, rescale=False)
    state = rule.init(Preference("thresholds", {"second": bound}))
    preference = torch.tensor([[float("nan"), bound]], dtype=torch.float64).expand(5, -1)
    groups = torch.zeros(5, dtype=torch.long)

    def optimum(state) -> Tensor:
        return (reference + rule.signal(rewards, preference, groups, state) / BETA).log_softmax(-1)

    start = float((optimum(state).exp() * rewards[:, 1]).sum())
    for number in range(300):
        mean = (optimum(state).exp()[:, None] * rewards).sum(0, keepdim=True)
        state = rule.observe(state, Round(number, mean, groups[:1], mean[0], ("first", "second")))
    log_p = optimum(state)
    p = log_p.exp()
    assert start < bound - 0.05 and float((p * rewards[:, 1]).sum()) == pytest.approx(bound, abs=1e-9)

    def worth(q: Tensor) -> float:
        return float((q * (rewards[:, 0] - BETA * (q.log() - reference))).sum())

    directions = torch.linalg.svd(torch.stack([torch.ones(5).double(), rewards[:, 1]]))[2][2:]  # keep mass and moment
    for direction in directions:
        for step in (-1e-3, 1e-3):
            assert worth(p + step * direction) < worth(p)

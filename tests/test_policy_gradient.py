"""Losses on sampled responses as mathematics: over all responses that there are, their gradients are as stated."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from pydantic import ValidationError
from tabular import DIE, REWARDS, SPEECH, on_policy, plain_terms

from moalign.api import Batch, PluginError
from moalign_plugins.objectives._policy_gradient import PolicyGradient
from moalign_plugins.objectives.grpo import GRPO
from moalign_plugins.objectives.gspo import GSPO
from moalign_plugins.objectives.reinforce import REINFORCE
from moalign_plugins.objectives.remax import ReMax
from moalign_plugins.objectives.rloo import RLOO

BETA = 0.3
EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1


def without_baseline(**options) -> REINFORCE:
    return REINFORCE(baseline="none", **options)


def centred(**options) -> GRPO:
    return GRPO(standardise=False, length="none", epsilon_low=None, epsilon_high=None, **options)


# How much of the reward's gradient the expected gradient has, where a group has G responses.
UNBIASED = {without_baseline: lambda size: 1.0, RLOO: lambda size: 1.0, ReMax: lambda size: 1.0}
SHRUNK = {REINFORCE: lambda size: (size - 1) / size, centred: lambda size: (size - 1) / size}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kl", ["reward", "k2", "k3", "forward"])
@pytest.mark.parametrize("kind", [*UNBIASED, *SHRUNK], ids=lambda kind: kind.__name__)
def test_the_expected_gradient_is_that_of_the_stated_target(kind, kl, size):
    """Over all groups of a language with responses of one and two tokens."""
    world = on_policy(SPEECH)
    share = (UNBIASED | SHRUNK)[kind](size)
    price = {
        "reward": lambda: share * world.divergence(),
        "k2": world.divergence,
        "k3": lambda: world.divergence_of_tokens(forward=False),
        "forward": lambda: world.divergence_of_tokens(forward=True),
    }[kl]
    expected = -world.gradient(share * world.reward() - BETA * price())
    found = world.expected_gradient(kind(beta=BETA, kl=kl), size)
    torch.testing.assert_close(found, expected, **EXACT)
    without_price = -world.gradient(share * world.reward())
    assert (expected - without_price).abs().max() > 1e-2  # so that the KL's part is seen


@pytest.mark.parametrize("kind", [RLOO, REINFORCE, without_baseline, ReMax, GRPO, GSPO], ids=lambda kind: kind.__name__)
def test_the_sampled_gradient_is_within_its_standard_error(kind):
    """60 batches of 100 groups; four standard errors for each of the 8 parameters."""
    world, objective = on_policy(SPEECH), kind(beta=BETA)
    expected = world.expected_gradient(objective, 3)
    generator = torch.Generator().manual_seed(0)
    probabilities = SPEECH.logps(world.sampler.detach()).sum(-1).exp()
    batches = probabilities.multinomial(60 * 100 * 3, replacement=True, generator=generator).view(60, 100, 3)
    found = torch.stack([world.gradient(world.losses(objective, drawn).mean()) for drawn in batches])
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 4 * error + 1e-12).all()
    assert (expected.abs() > 8 * error).sum() >= 4  # another gradient would be seen


# --- the greedy response as baseline ---------------------------------------------------------------------------------


@pytest.mark.parametrize("language", [SPEECH, DIE], ids=["speech", "one token"])
def test_remax_is_unbiased_with_a_single_response_too(language):
    world = on_policy(language)
    expected = -world.gradient(world.reward() - BETA * world.divergence())
    torch.testing.assert_close(world.expected_gradient(ReMax(beta=BETA), 1), expected, **EXACT)
    assert (expected - world.expected_gradient(RLOO(beta=BETA), 1)).abs().max() > 1e-2  # which has no baseline then


def test_what_a_prompt_adds_to_all_rewards_does_not_reach_the_loss_of_remax():
    """r + c(x), to the last bit of the sum; not so without a baseline."""
    world, drawn = on_policy(SPEECH), torch.arange(6)[:, None]
    raised = replace(world, rewards=world.rewards + 4.0)
    for objective, same in ((ReMax(beta=BETA), True), (without_baseline(beta=BETA), False)):
        losses, others = (each.losses(objective, drawn) for each in (world, raised))
        assert torch.allclose(losses, others, rtol=0, atol=1e-12) == same


def test_remax_by_hand_where_a_response_is_one_token():
    """(r - r of the likeliest face - beta log-ratio) times -grad log pi(face), which is p - onehot."""
    world = on_policy(DIE)
    p, reference = world.policy.detach().softmax(-1), world.reference.detach().softmax(-1)
    for face in range(5):
        loss = world.losses(ReMax(beta=BETA), torch.tensor([[face]])).sum()
        worth = world.rewards[face] - world.rewards[p.argmax()] - BETA * (p[face] / reference[face]).log()
        expected = worth * (p - torch.nn.functional.one_hot(torch.tensor(face), 5))
        torch.testing.assert_close(world.gradient(loss), expected, **EXACT)


def test_the_greedy_response_has_the_advantage_0_before_its_kl():
    groups = torch.tensor([3, 3, 8])
    signal, greedy = torch.tensor([[1.0, 0.5, -2.0], [1.0, 1.0, -1.0]], dtype=torch.float64)
    assert ReMax(kl="k2").advantages(signal, groups, None, greedy).tolist() == [0.0, -0.5, -1.0]
    priced = ReMax(beta=0.5).advantages(signal, groups, torch.ones(3, dtype=torch.float64), greedy)
    assert priced.tolist() == [-0.5, -1.0, -1.5]
    with pytest.raises(PluginError, match="greedy"):
        ReMax(kl="k2").advantages(signal, groups, None)


# --- GRPO's own target ----------------------------------------------------------------------------------------------


def grpo_by_hand(size: int) -> torch.Tensor:
    """-E[mean over the group of A_i grad log pi(y_i) / |y_i|], with A by plain Python."""
    world = on_policy(SPEECH)
    logps = SPEECH.logps(world.policy)
    scores = [world.gradient(SPEECH.logps(world.policy)[y].sum()) for y in range(6)]
    total = torch.zeros_like(world.policy)
    for drawn in product(range(6), repeat=size):
        rewards = [float(REWARDS[y]) for y in drawn]
        mean = sum(rewards) / size
        deviation = (sum((r - mean) ** 2 for r in rewards) / (size - 1)) ** 0.5
        probability = float(logps.detach().sum(-1)[list(drawn)].sum().exp())
        for y, reward in zip(drawn, rewards, strict=True):
            advantage = (reward - mean) / (deviation + 1e-4)
            total -= probability * advantage * scores[y] / len(SPEECH.responses[y]) / size
    return total


@pytest.mark.parametrize("kind", [GRPO, GSPO])
@pytest.mark.parametrize("size", [2, 3])
def test_with_standardisation_it_is_that_of_its_own_estimator(kind, size):
    found = on_policy(SPEECH).expected_gradient(kind(beta=0.0), size)
    torch.testing.assert_close(found, grpo_by_hand(size), **EXACT)


def test_standardisation_is_another_target():
    world = on_policy(SPEECH)
    scaled = grpo_by_hand(3)
    plain = world.expected_gradient(centred(beta=0.0), 3)
    cosine = torch.nn.functional.cosine_similarity(scaled, plain, dim=0)
    assert 0.1 < cosine < 0.99


def test_in_the_reward_the_price_of_the_kl_is_standardised_too():
    """With rewards that are all the same only the KL is left, and beta does not matter to the gradient."""
    world = replace(on_policy(SPEECH), rewards=torch.zeros(6, dtype=torch.float64))
    first, second = (world.expected_gradient(GRPO(beta=beta, kl="reward"), 2) for beta in (50.0, 100.0))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    first, second = (world.expected_gradient(GRPO(beta=beta, kl="k2"), 2) for beta in (50.0, 100.0))
    torch.testing.assert_close(2 * first, second, rtol=1e-12, atol=1e-12)


# --- the KL as a loss: five outcomes --------------------------------------------------------------------------------


def kl_gradient(kl: str, world) -> torch.Tensor:
    """The expected gradient where all rewards are 0 and nothing but the KL is left."""
    silent = replace(world, rewards=torch.zeros(5, dtype=torch.float64))
    return silent.expected_gradient(without_baseline(beta=1.0, kl=kl), 1)


def test_which_kl_each_estimator_descends():
    world = on_policy(DIE)
    reverse = world.gradient(world.divergence())
    forward = world.gradient(world.divergence_of_tokens(forward=True))
    for kl in ("reward", "k2", "k3"):
        torch.testing.assert_close(kl_gradient(kl, world), reverse, **EXACT)
    torch.testing.assert_close(kl_gradient("forward", world), forward, **EXACT)
    assert (reverse - forward).abs().max() > 0.1


def test_the_log_ratio_as_a_loss_has_no_gradient_on_average_and_is_refused():
    world = on_policy(DIE)
    own = DIE.logps(world.policy)
    (k1,) = torch.autograd.grad((own.detach().exp() * own).sum(), world.policy)
    torch.testing.assert_close(k1, torch.zeros_like(k1), **EXACT)
    with pytest.raises(ValidationError, match="no gradient on average; use 'reward', or 'k2'"):
        GRPO(kl="k1")


def test_k3_is_the_reverse_kl_also_away_from_the_policy_that_sampled():
    """With its ratio to the sampler both value and gradient are exact; k2 is so only where that is the policy."""
    world = replace(on_policy(DIE), sampler=DIE.parameters(7))
    torch.testing.assert_close(kl_gradient("k3", world), world.gradient(world.divergence()), **EXACT)
    assert (kl_gradient("k2", world) - world.gradient(world.divergence())).abs().max() > 0.05
    every = torch.arange(5)[:, None]
    silent = replace(world, rewards=torch.zeros(5, dtype=torch.float64))
    losses = silent.losses(without_baseline(beta=1.0, kl="k3"), every).squeeze(1)
    value = (DIE.logps(world.sampler.detach()).sum(-1).exp() * losses).sum()
    torch.testing.assert_close(value, world.divergence(), **EXACT)


def test_importance_weights_make_a_single_token_exact_away_from_the_sampler():
    world = replace(on_policy(DIE), sampler=DIE.parameters(7))
    found = world.expected_gradient(RLOO(beta=0.0), 2)
    torch.testing.assert_close(found, -world.gradient(world.reward()), **EXACT)


# --- advantages -----------------------------------------------------------------------------------------------------

SIGNAL = torch.tensor([0.3, 2.0, -1.0, 0.5, 0.7, 0.1], dtype=torch.float64)
GROUPS = torch.tensor([4, 4, 4, 4, 9, 9])


def test_rloo_compares_with_the_mean_of_the_others():
    log_ratios = SIGNAL.flip(0)
    values = SIGNAL - 0.2 * log_ratios
    expected = []
    for i in range(6):
        others = [float(values[j]) for j in range(6) if j != i and GROUPS[j] == GROUPS[i]]
        expected.append(float(values[i]) - sum(others) / len(others))
    found = RLOO(beta=0.2).advantages(SIGNAL, GROUPS, log_ratios)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)
    size = torch.tensor([4, 4, 4, 4, 2, 2], dtype=torch.float64)
    mean_baseline = REINFORCE(beta=0.2).advantages(SIGNAL, GROUPS, log_ratios)
    torch.testing.assert_close(found, size / (size - 1) * mean_baseline, **EXACT)


def test_grpo_divides_by_the_deviation_with_divisor_one_less():
    found = GRPO().advantages(SIGNAL, GROUPS, None)
    for group in (4, 9):
        own = SIGNAL[group == GROUPS]
        torch.testing.assert_close(found[group == GROUPS], (own - own.mean()) / (own.std() + 1e-4), **EXACT)


@pytest.mark.parametrize("kind", [RLOO, REINFORCE, GRPO, GSPO])
def test_a_response_that_is_alone_or_like_all_others_counts_nothing(kind):
    signal, groups = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64), torch.tensor([0, 1, 1, 1])
    found = kind(kl="k2").advantages(signal, groups, None)
    assert found.abs().max() < 1e-10  # of the mean of three equal numbers the last bit may differ


def test_standardising_before_and_after_weighting_are_two_rules():
    """A factor on the rewards is lost, and the sum of standardised rewards is not the standardised sum."""
    first, second = SIGNAL[:4], 3 * SIGNAL[:4].flip(0) ** 2
    groups = torch.zeros(4, dtype=torch.long)
    grpo = GRPO()
    alone = grpo.advantages(first, groups, None)
    torch.testing.assert_close(grpo.advantages(5 * first, groups, None), alone, rtol=0, atol=2e-4)
    before = 0.5 * alone + 0.5 * grpo.advantages(second, groups, None)
    after = grpo.advantages(0.5 * first + 0.5 * second, groups, None)
    assert (before - after).abs().max() > 0.1


# --- the loss of a response -----------------------------------------------------------------------------------------


def batch_of(ratios: list[list[float]], advantages: list[float]) -> Batch:
    """Responses of the given ratios to the policy that sampled them; a ratio of 0 stands for no token."""
    ratio = torch.tensor(ratios, dtype=torch.float64)
    mask = (ratio > 0).double()
    logps = torch.where(ratio > 0, ratio.clamp(min=1e-9).log() - 2, 0.0)
    rows = torch.arange(len(ratios))
    return Batch(
        logps=logps.requires_grad_(),
        mask=mask,
        pairs=torch.stack([rows, rows], 1),
        pair_objective=torch.full_like(rows, -1),
        preference=torch.ones(len(rows), 1, dtype=torch.float64),
        strength=torch.ones(len(rows), dtype=torch.float64),
        groups=rows,
        ref_logps=logps.detach(),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        old_logps=-2 * mask,
    )


def loss_and_gradient(objective: PolicyGradient, batch: Batch) -> tuple[list[float], list[list[float]]]:
    losses = objective.loss(batch, plain_terms(len(batch.logps)))
    (gradient,) = torch.autograd.grad(losses.sum(), batch.logps)
    return losses.tolist(), gradient.tolist()


def test_a_token_counts_no_more_beyond_its_bound():
    ratios, advantages = [[1.1], [1.5], [0.5], [0.9], [1.5], [0.5]], [1, 1, 1, -1, -1, -1]
    objective = GRPO(epsilon_low=0.2, epsilon_high=0.3, beta=0.0)
    losses, gradient = loss_and_gradient(objective, batch_of(ratios, advantages))
    assert losses == pytest.approx([-1.1, -1.3, -0.5, 0.9, 1.5, 0.8])
    assert [row[0] for row in gradient] == pytest.approx([-1.1, 0, -0.5, 0.9, 1.5, 0])


def test_a_sequence_has_one_ratio_of_all_its_tokens():
    ratios = [[1.21, 1.0], [1.44, 1.0], [0.64, 0.0]]
    objective = GSPO(epsilon_low=0.15, epsilon_high=0.15, beta=0.0)
    losses, gradient = loss_and_gradient(objective, batch_of(ratios, [1, 1, 1]))
    assert losses == pytest.approx([-1.1, -1.15, -0.64])
    assert gradient[0] == pytest.approx([-0.55, -0.55])
    assert gradient[1] == [0, 0]
    assert gradient[2] == pytest.approx([-0.64, 0])


@pytest.mark.parametrize(
    ("length", "expected"), [("none", [-2.2, -1.1]), ("response", [-1.1, -1.1]), (8, [-2.2 / 8, -1.1 / 8])]
)
def test_what_the_sum_over_tokens_is_divided_by(length, expected):
    losses, _ = loss_and_gradient(GRPO(length=length, beta=0.0), batch_of([[1.1, 1.1], [1.1, 0.0]], [1, 1]))
    assert losses == pytest.approx(expected)


def test_the_length_of_a_sequence_ratio_is_not_an_option():
    with pytest.raises(ValidationError):
        GSPO(length="none")
    with pytest.raises(ValidationError):
        GRPO(length=0)

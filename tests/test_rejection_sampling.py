"""Rejection sampling: which responses are kept, what they are worth, and a policy that learns from its own best."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from tabular import DIE, REWARDS, SPEECH, Situation, on_policy, plain_terms
from torch import Tensor

from moalign.api import Batch, PluginError, Preference
from moalign.engine.advantages import Advantages
from moalign.testing import check_objective
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.objectives.rejection_sampling import RejectionSampling
from moalign_plugins.objectives.sft import SFT

EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1
NAMES = ("helpful", "verbose")
ROUND = np.random.default_rng(0).normal(size=(12, 2))  # rewards of 4 responses to each of 3 prompts
GROUPS = np.repeat([5, 2, 9], 4)


def counted(signal: list[float], groups: list[int] | None = None, **options: Any) -> list[float]:
    numbers = torch.zeros(len(signal), dtype=torch.long) if groups is None else torch.tensor(groups)
    objective = RejectionSampling(**options)
    return objective.advantages(torch.tensor(signal, dtype=torch.float64), numbers, None).tolist()


def winners(rewards: np.ndarray, vector: tuple[float, float], kind: Any = "direction") -> list[int]:
    """The response to each prompt that counts, for a combined reward of vector.r; any length of the vector."""
    preference = Preference(kind, dict(zip(NAMES, vector, strict=True)))
    rule = Advantages(RejectionSampling(), Linear(), preference, NAMES, "c")
    return np.flatnonzero(rule.of(0, rewards, GROUPS[: len(rewards)], None)[0]).tolist()


def batch_of(world: Situation, rows: Tensor, advantages: Tensor) -> Batch:
    places = torch.arange(len(rows))
    return Batch(
        logps=world.language.logps(world.policy)[rows],
        mask=world.language.mask[rows],
        pairs=torch.stack([places, places], 1),
        pair_objective=torch.full_like(places, -1),
        preference=torch.ones(len(rows), 1, dtype=torch.float64),
        strength=torch.ones(len(rows), dtype=torch.float64),
        groups=places,
        advantages=advantages,
    )


# --- which are kept -------------------------------------------------------------------------------------------------


def test_the_best_counts_for_all_responses_to_its_prompt():
    assert counted([0.2, 0.9, -1.0], [3, 3, 3]) == [0, 3, 0]
    assert counted([0.2, 0.9, 0.1, 0.5, -2.0], [3, 8, 3, 8, 3], keep=1) == [3, 2, 0, 0, 0]
    assert counted([0.2, 0.9, -1.0, 0.5], keep=2) == [0, 2, 0, 2]


def test_of_equal_signals_the_earlier_response_is_kept():
    assert counted([0.1, 0.7, 0.7, 0.7]) == [0, 4, 0, 0]
    assert counted([0.7, 0.1, 0.7, 0.7], keep=2) == [2, 0, 2, 0]
    assert counted([0.3] * 40, [0, 1] * 20) == [20, 20] + [0] * 38  # where an unstable sort would mix them


def test_a_longer_preference_vector_keeps_the_same():
    for vector in ((0.8, 0.6), (0.8, -0.6), (-0.1, 0.3)):
        kept = winners(ROUND, vector)
        assert len(kept) == 3
        for factor in (1e-3, 7.0, 250.0):
            first, second = vector
            assert winners(ROUND, (factor * first, factor * second)) == kept


def test_one_component_alone_is_that_objective():
    for place, vector in enumerate(((1.0, 0.0), (0.0, 1.0))):
        expected = [4 * prompt + int(own.argmax()) for prompt, own in enumerate(ROUND[:, place].reshape(3, 4))]
        assert winners(ROUND, vector) == expected
        other = ROUND.copy()
        other[:, 1 - place] = 100.0 * ROUND[::-1, place]
        assert winners(other, vector) == expected


def test_swapping_the_components_changes_the_winner():
    """Three responses: good at the one, good at the other, middling in both; and a fourth that is always worse."""
    rewards = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.6], [0.2, 0.2]])
    assert winners(rewards, (0.96, 0.28)) == [0]
    assert winners(rewards, (0.28, 0.96)) == [1]
    assert winners(rewards, (0.6, 0.8)) == winners(rewards, (0.8, 0.6)) == [2]


def test_a_negative_component_keeps_what_has_less_of_it():
    """Less verbosity, as directional preference alignment has it: the helpful response that says it in few words."""
    rewards = np.array([[0.9, 0.9], [0.8, 0.1], [0.1, 0.0], [0.85, 0.5]])
    assert winners(rewards, (1.0, 0.0)) == [0]
    assert winners(rewards, (0.8, -0.6)) == [1]
    assert winners(rewards, (0.8, 0.6)) == [0]
    assert winners(rewards, (0.0, -1.0)) == [2]


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("case", ["one response to each prompt", "all are kept"])
def test_without_a_choice_it_is_supervised_fine_tuning_on_its_own_samples(average, case):
    world, rows = on_policy(SPEECH), torch.tensor([0, 3, 3, 5, 1, 2])
    alone = case == "one response to each prompt"
    groups = torch.arange(6) if alone else torch.arange(6) // 3
    objective = RejectionSampling(average=average, keep=1 if alone else 3)
    counts = objective.advantages(REWARDS[rows], groups, None)
    assert counts.tolist() == [1.0] * 6
    batch, terms = batch_of(world, rows, counts), plain_terms(6)
    torch.testing.assert_close(objective.loss(batch, terms), SFT(average=average).loss(batch, terms), **EXACT)
    assert objective.loss(batch, terms).std() > 0.1


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_mean_over_all_rows_is_the_mean_over_those_kept(keep):
    world, rows = on_policy(SPEECH), torch.tensor([0, 1, 2, 3, 4, 5, 2, 1])
    objective = RejectionSampling(keep=keep)
    counts = objective.advantages(REWARDS[rows], torch.arange(8) // 4, None)
    kept = counts.nonzero().squeeze(1)
    assert len(kept) == 2 * keep
    batch = batch_of(world, rows, counts)
    losses = objective.loss(batch, plain_terms(8))
    own = SFT().loss(batch, plain_terms(8))[kept]
    torch.testing.assert_close(losses.mean(), own.mean(), **EXACT)
    assert losses[counts == 0].abs().max() == 0


def test_what_is_not_kept_has_no_gradient():
    world = on_policy(SPEECH)
    logps = SPEECH.logps(world.policy).detach().requires_grad_()
    batch = replace(batch_of(world, torch.arange(6), torch.tensor([0, 0, 6.0, 0, 0, 0]).double()), logps=logps)
    (gradient,) = torch.autograd.grad(RejectionSampling().loss(batch, plain_terms(6)).sum(), logps)
    assert gradient[2].tolist() == [-3.0, -3.0]
    assert not gradient[[0, 1, 3, 4, 5]].any()


def test_without_advantages_it_says_what_is_missing():
    batch = replace(batch_of(on_policy(SPEECH), torch.arange(6), REWARDS), advantages=None)
    with pytest.raises(PluginError, match='does not declare "groups"'):
        RejectionSampling().loss(batch, plain_terms(6))


@pytest.mark.parametrize("options", [{}, {"keep": 2}, {"average": False}])
def test_it_conforms(options):
    check_objective(RejectionSampling(**options))


# --- what the kept ones are worth -----------------------------------------------------------------------------------


def best_of(probabilities: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Of each response the probability of being the best of n, where no two rewards are equal: F(y)^n - F(y-)^n."""
    below = torch.stack([probabilities[rewards < reward].sum() for reward in rewards])
    return (below + probabilities) ** n - below**n


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_kept_response_is_the_largest_order_statistic(n):
    """Over all groups of n responses that the policy can draw."""
    probabilities = SPEECH.logps(on_policy(SPEECH).policy.detach()).sum(-1).exp()
    found = torch.zeros(6, dtype=torch.float64)
    for drawn in product(range(6), repeat=n):
        counts = RejectionSampling().advantages(REWARDS[list(drawn)], torch.zeros(n, dtype=torch.long), None)
        for response, count in zip(drawn, counts.tolist(), strict=True):
            found[response] += probabilities[list(drawn)].prod() * count / n
    torch.testing.assert_close(found, best_of(probabilities, REWARDS, n), **EXACT)


def test_the_expected_reward_of_the_kept_response_does_not_fall_with_the_number_of_samples():
    """Also with equal rewards, and where all are equal it stays."""
    probabilities = SPEECH.logps(on_policy(SPEECH).policy.detach()).sum(-1).exp()
    for rewards, rises in ((REWARDS, True), (REWARDS.round(), True), (REWARDS * 0 + 0.4, False)):
        expected = []
        for n in range(1, 5):
            total = 0.0
            for drawn in product(range(6), repeat=n):
                own = rewards[list(drawn)]
                counts = RejectionSampling().advantages(own, torch.zeros(n, dtype=torch.long), None)
                total += float(probabilities[list(drawn)].prod() * (counts * own).mean())
            expected.append(total)
        assert expected[0] == pytest.approx(float((probabilities * rewards).sum()), abs=1e-12)
        steps = np.diff(expected)
        assert (steps > 0.01).all() if rises else np.abs(steps).max() < 1e-12


# --- learning from it -----------------------------------------------------------------------------------------------


def test_its_own_samples_alone_teach_nothing_on_average():
    world = on_policy(SPEECH)
    assert world.expected_gradient(RejectionSampling(average=False, keep=3), 3).abs().max() < 1e-12
    assert world.expected_gradient(RejectionSampling(average=False), 3).abs().max() > 0.1


@pytest.mark.parametrize("language", [SPEECH, DIE])
def test_a_round_leads_to_the_distribution_of_the_best_of_n(language):
    """There the expected gradient is 0, as it is for likelihood on any samples at their own distribution."""
    world, n = on_policy(language), 3
    objective = RejectionSampling(average=False)
    probabilities = language.logps(world.sampler.detach()).sum(-1).exp()
    target = best_of(probabilities, world.rewards, n)
    there = replace(world, policy=language.fitted(target.log()))
    assert there.expected_gradient(objective, n).abs().max() < 1e-12


@pytest.mark.parametrize("average", [True, False])
def test_iterated_rounds_raise_the_expected_reward(average):
    objective, world = RejectionSampling(average=average), on_policy(SPEECH)
    reached = [world.reward().item()]
    for _ in range(4):
        for _ in range(15):
            moved = world.policy.detach() - 1.0 * world.expected_gradient(objective, 3)
            world = replace(world, policy=moved.requires_grad_())  # the sampler stays for the round
        world = replace(world, sampler=world.policy)
        reached.append(world.reward().item())
    assert all(after > before + 0.02 for before, after in pairwise(reached)), reached
    assert reached[-1] > 0.9 * REWARDS.max()

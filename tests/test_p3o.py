"""P3O as mathematics: its expected gradient by enumeration, both clips, and which rewards are the same to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tabular import DIE, SPEECH, on_policy, plain_terms

from moalign.api import Batch, PluginError
from moalign.testing import check_objective
from moalign_plugins.objectives.p3o import P3O
from moalign_plugins.objectives.reinforce import REINFORCE

BETA = 0.3
EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1


@pytest.mark.parametrize("options", [{}, {"clip": "separate"}, {"epsilon": None}, {"beta": 0.0, "epsilon": 3.0}])
def test_it_conforms(options):
    check_objective(P3O(**{"beta": 0.1} | options))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("clip", ["separate", "joint"])
def test_at_the_policy_that_sampled_the_expected_gradient_is_the_policy_gradient(clip, size):
    world = on_policy(SPEECH)
    expected = -world.gradient(world.reward() - BETA * world.divergence())
    torch.testing.assert_close(world.expected_gradient(P3O(beta=BETA, clip=clip), size), expected, **EXACT)
    assert (expected + world.gradient(world.reward())).abs().max() > 1e-2  # so that the KL's part is seen


@pytest.mark.parametrize("language", [SPEECH, DIE])
@pytest.mark.parametrize("clip", ["separate", "joint"])
def test_away_from_it_the_weights_of_both_responses_keep_it_exact(clip, language):
    """Where nothing is clipped; the ratios are those of whole responses, so that several tokens do not matter."""
    world = replace(on_policy(language), sampler=language.parameters(7))
    expected = -world.gradient(world.reward())
    found = world.expected_gradient(P3O(beta=0.0, clip=clip, epsilon=None), 2)
    torch.testing.assert_close(found, expected, **EXACT)
    clipped = world.expected_gradient(P3O(beta=0.0, clip=clip), 2)
    assert (clipped - expected).abs().max() > 1e-2


def test_what_a_prompt_adds_to_all_rewards_changes_nothing():
    """Not so of a clipped policy gradient that has only learnt a wrong baseline."""
    world, drawn = replace(on_policy(SPEECH), sampler=SPEECH.parameters(7)), torch.tensor([[0, 2], [4, 1], [3, 3]])
    raised = replace(world, rewards=world.rewards + 1024.0)
    ppo = REINFORCE(baseline="none", epsilon_low=0.2, epsilon_high=0.2)
    for objective, same in ((P3O(), True), (P3O(clip="separate"), True), (ppo, False)):
        first, second = (each.gradient(each.losses(objective, drawn).sum()) for each in (world, raised))
        assert torch.allclose(first, second, rtol=0, atol=1e-11) == same


# --- the loss of a pair ---------------------------------------------------------------------------------------------


def batch_of(ratios: list[float], rewards: list[float], groups: list[int]) -> Batch:
    """Responses of one token with these ratios to the policy that sampled them."""
    rows = torch.arange(len(ratios))
    logps = (torch.tensor(ratios, dtype=torch.float64).log() - 2)[:, None]
    return Batch(
        logps=logps.requires_grad_(),
        mask=torch.ones_like(logps),
        pairs=torch.stack([rows, rows], 1),
        pair_objective=torch.full_like(rows, -1),
        preference=torch.ones(len(rows), 1, dtype=torch.float64),
        strength=torch.ones(len(rows), dtype=torch.float64),
        groups=torch.tensor(groups),
        advantages=torch.tensor(rewards, dtype=torch.float64),
        old_logps=torch.full_like(logps, -2.0),
    )


def slopes(objective: P3O, *given) -> tuple[list[float], list[float]]:
    batch = batch_of(*given)
    losses = objective.loss(batch, plain_terms(len(batch.logps)))
    (gradient,) = torch.autograd.grad(losses.sum(), batch.logps)
    return losses.tolist(), gradient.squeeze(1).tolist()


@pytest.mark.parametrize(("clip", "weight"), [("separate", 1.2 * 1.1), ("joint", 1.2)])
def test_the_weight_is_of_clipped_ratios_or_of_their_clipped_product(clip, weight):
    """Ratios of 1.3 and 1.1: the log-ratio has gone by log(1.3 / 1.1), which is within 0.2."""
    losses, gradient = slopes(P3O(clip=clip), [1.3, 1.1], [0.5, -0.5], [4, 4])
    gone = torch.tensor(1.3 / 1.1, dtype=torch.float64).log().item()
    assert losses == pytest.approx([-weight * gone / 2] * 2)
    assert gradient == pytest.approx([-weight, weight])  # both rows have half of the pair's loss: twice a half


def test_a_pair_that_has_gone_far_enough_counts_no_more_and_one_that_went_astray_does():
    for rewards, expected in (([0.5, -0.5], [0.0, 0.0]), ([-0.5, 0.5], [1.2, -1.2])):
        _, gradient = slopes(P3O(), [1.5, 1.0], rewards, [4, 4])
        assert gradient == pytest.approx(expected)


def test_responses_to_other_prompts_and_a_lonely_one_do_not_meet():
    together, _ = slopes(P3O(), [1.1, 0.9, 1.05, 0.95, 1.1], [1.0, -1.0, 0.3, -0.3, 0.0], [2, 2, 7, 7, 1])
    apart = slopes(P3O(), [1.1, 0.9], [1.0, -1.0], [0, 0])[0] + slopes(P3O(), [1.05, 0.95], [0.3, -0.3], [0, 0])[0]
    assert together == pytest.approx([*apart, 0.0])


def test_three_responses_are_the_mean_over_their_pairs():
    ratios, rewards = [1.1, 0.9, 1.0], [1.0, -0.4, -0.6]
    losses, _ = slopes(P3O(), ratios, rewards, [0, 0, 0])
    pairs = [
        slopes(P3O(), [ratios[i], ratios[j]], [rewards[i], rewards[j]], [0, 0])[0][0]
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert sum(losses) / 3 == pytest.approx(sum(pairs) / 3)


def test_what_is_not_declared_is_said():
    batch = batch_of([1.0, 1.0], [1.0, -1.0], [0, 0])
    with pytest.raises(PluginError, match='"old_logps" in `needs`'):
        P3O().loss(replace(batch, old_logps=None), plain_terms(2))
    with pytest.raises(PluginError, match='"reference" in `needs_with`'):
        P3O().advantages(torch.zeros(2), torch.zeros(2), None)

"""Asymmetric policy optimisation: what the KL of a response counts, what length costs a wrong one, and its gradient."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from tabular import REWARDS, SPEECH, on_policy
from torch import Tensor

from moalign.api import TokenAdvantages, Tokens
from moalign.testing import check_objective
from moalign_plugins.objectives.asymmetric_apo import AsymmetricAPO
from moalign_plugins.objectives.grpo import GRPO

EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1
SWITCHED_OFF: dict[str, Any] = {"sharpness": None, "base": 1.0}


def weighed(objective: AsymmetricAPO, signal: list[float], lengths: list[int], groups: list[int]) -> TokenAdvantages:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).double()
    tokens = Tokens(mask, torch.ones(len(lengths), dtype=torch.bool), mask * -0.5, mask * -0.7)
    return objective.token_advantages(torch.tensor(signal, dtype=torch.float64), torch.tensor(groups), tokens)


@pytest.mark.parametrize("options", [{}, {"beta": 0.3, "kl": "k3", "base": 1.2}, {"beta": 0.3} | SWITCHED_OFF])
def test_it_conforms(options):
    check_objective(AsymmetricAPO(**options))


# --- divergence shaping ---------------------------------------------------------------------------------------------


def test_what_the_kl_counts_by_the_share_of_wrong_responses():
    """Of the best of eight, from none wrong to all wrong; 1 - exp(-e p) between."""
    counts = []
    for wrong in range(9):
        signal = [1.0] * (8 - wrong) + [0.0] * wrong
        counts.append(weighed(AsymmetricAPO(), signal, [2] * 8, [0] * 8).known["kl_share"][0, 0].item())
    assert counts == pytest.approx([1, 0.907, 0.870, 0.817, 0.743, 0.639, 0.493, 0.288, 1], abs=5e-4)


def test_responses_that_are_no_better_than_the_mean_pay_it_in_full():
    share = weighed(AsymmetricAPO(), [1, 0, 0, 1, 1], [1, 3, 2, 2, 1], [4, 4, 4, 9, 9]).known["kl_share"]
    assert share[0, 0].item() == pytest.approx(1 - 2.718281828459045 ** (-2.718281828459045 / 3))
    assert share[1:, 0].tolist() == [1] * 4  # of the prompt 9 all responses are right
    assert share[0, 1:].tolist() == [0, 0]  # no tokens


# --- length ---------------------------------------------------------------------------------------------------------


def factors(signal: list[float], lengths: list[int], groups: list[int] | None = None, **options: Any) -> list[float]:
    """What the advantages have been multiplied by; 1 where they are 0."""
    groups = [0] * len(signal) if groups is None else groups
    own = weighed(AsymmetricAPO(**options), signal, lengths, groups).advantages[:, 0]
    plain = GRPO().advantages(torch.tensor(signal, dtype=torch.float64), torch.tensor(groups), None)
    return torch.where(plain == 0, 1.0, own / plain).tolist()


def test_a_wrong_response_longer_than_the_right_ones_on_average_is_held_to_it():
    """The right ones have 4 and 8 tokens."""
    found = factors([1, 1, 0, 0, 0], [4, 8, 6, 7, 30], base=1.1)
    assert found == pytest.approx([1, 1, 1, 2 - 1.1**-1, 2 - 1.1**-24])
    usual = factors([1, 1, 0, 0, 0], [4, 8, 6, 7, 30])
    assert usual == pytest.approx([1, 1, 1, 2 - 1.00001**-1, 2 - 1.00001**-24], abs=1e-12) and usual[4] > 1


def test_without_a_right_response_there_is_nothing_to_be_longer_than():
    assert factors([0.4, 0.1, 0.0], [1, 20, 40], base=1.1) == [1, 1, 1]


def test_a_right_response_and_one_better_than_the_mean_are_never_held_to_it():
    """Rewards between 0 and 1: the second response is wrong, and has a positive advantage."""
    assert factors([0.9, 0.45, 0, 0], [1, 30, 30, 1], base=1.1) == pytest.approx([1, 1, 2 - 1.1**-29, 1])


def test_lengths_are_compared_within_a_prompt():
    found = factors([1, 0, 1, 0], [2, 5, 9, 5], [3, 3, 7, 7], base=1.1)
    assert found == pytest.approx([1, 2 - 1.1**-3, 1, 1])


def test_what_a_round_was_like_is_among_the_figures():
    figures = weighed(AsymmetricAPO(base=1.1), [1, 0, 0, 0], [2, 5, 1, 1], [3, 3, 3, 3]).figures
    assert figures["right"] == 0.25 and figures["longer"] == 0.25 and 0.5 < figures["kl_share"] < 1


# --- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["k3", "forward"])
def test_switched_off_it_is_grpo(kl):
    world, drawn = replace(on_policy(SPEECH), sampler=SPEECH.parameters(7)), torch.tensor([[0, 2, 4], [1, 1, 5]])
    off, grpo = AsymmetricAPO(beta=0.3, kl=kl, **SWITCHED_OFF), GRPO(beta=0.3, kl=kl)
    torch.testing.assert_close(world.losses(off, drawn), world.losses(grpo, drawn), **EXACT)
    on = AsymmetricAPO(beta=0.3, kl=kl, base=1.2)
    assert (world.losses(on, drawn) - world.losses(grpo, drawn)).abs().max() > 1e-2


def test_its_expected_gradient_is_that_of_its_own_estimator():
    """By plain Python: GRPO's, with both factors where they belong."""
    world, size, beta, base = on_policy(SPEECH), 3, 0.4, 1.5
    own, reference = SPEECH.logps(world.policy).detach(), SPEECH.logps(world.reference).detach()
    lengths = [len(response) for response in SPEECH.responses]

    def slope(weights: Tensor) -> Tensor:
        return world.gradient((SPEECH.logps(world.policy) * weights).sum())

    total = torch.zeros(6, 2, dtype=torch.float64)  # of each response's tokens
    for drawn in product(range(6), repeat=size):
        probability = float(own.sum(-1)[list(drawn)].sum().exp())
        rewards = [float(REWARDS[y]) for y in drawn]
        mean = sum(rewards) / size
        deviation = (sum((r - mean) ** 2 for r in rewards) / (size - 1)) ** 0.5
        right = [lengths[y] for y in drawn if REWARDS[y] > 0.35]
        for y, reward in zip(drawn, rewards, strict=True):
            advantage, share = (reward - mean) / (deviation + 1e-4), 1.0
            if advantage > 0 and 0 < len(right) < size:
                share = 1 - 2.718281828459045 ** (-2.718281828459045 * len(right) / size)
            if advantage < 0 and reward <= 0.35 and right and lengths[y] > sum(right) / len(right):
                advantage *= 2 - base ** (sum(right) / len(right) - lengths[y])
            k3 = share * beta * (1 - (reference[y] - own[y]).exp())  # the slope of exp(-a) - 1 + a
            total[y] += probability / size / lengths[y] * (k3 - advantage) * SPEECH.mask[y]
    found = world.expected_gradient(AsymmetricAPO(beta=beta, base=base, threshold=0.35), size)
    torch.testing.assert_close(found, slope(total), **EXACT)
    grpo = world.expected_gradient(GRPO(beta=beta, kl="forward"), size)
    assert (found - grpo).abs().max() > 1e-2

"""SuperHF as mathematics: which response is kept, which way round its KL is, and what is left without it."""

from __future__ import annotations

import pytest
import torch
from tabular import DIE, EVEN, MORE_REWARDS, on_policy

from moalign.testing import check_objective
from moalign_plugins.objectives.rejection_sampling import RejectionSampling
from moalign_plugins.objectives.superhf import SuperHF

EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1


@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
def test_it_conforms(beta):
    check_objective(SuperHF(beta=beta))


def test_the_best_of_each_prompt_counts_for_all_and_of_equals_the_earlier():
    signal = torch.tensor([0.2, 0.9, 0.1, 0.5, -2.0, 0.5], dtype=torch.float64)
    assert SuperHF().advantages(signal, torch.tensor([3, 8, 3, 8, 3, 4]), None).tolist() == [3, 2, 0, 0, 0, 1]
    assert SuperHF().advantages(signal[3:], torch.zeros(3, dtype=torch.long), None).tolist() == [3, 0, 0]


def test_without_the_kl_it_is_rejection_sampling():
    world, drawn = on_policy(EVEN, MORE_REWARDS), torch.tensor([[0, 2, 4], [1, 1, 6]])
    losses = world.losses(SuperHF(beta=0.0), drawn)
    assert torch.equal(losses, world.losses(RejectionSampling(), drawn))
    assert (losses - world.losses(SuperHF(), drawn)).abs().max() > 1e-2
    assert SuperHF(beta=0.0).wants == {"groups"} and "distributions" in SuperHF().wants


def test_the_kl_is_that_from_the_reference_to_the_policy():
    """Two categorical distributions, by definition; the other way round it would be another number."""
    world, every = on_policy(DIE), torch.arange(5)[:, None]
    p, q = world.policy.detach().softmax(-1), world.reference.detach().softmax(-1)
    kl = world.losses(SuperHF(beta=1.0), every) - world.losses(SuperHF(beta=0.0), every)
    forward, reverse = float((q * (q / p).log()).sum()), float((p * (p / q).log()).sum())
    assert kl.flatten().tolist() == pytest.approx([forward] * 5, abs=1e-12)
    assert abs(forward - reverse) > 0.05


def test_both_are_means_over_the_tokens_of_the_response():
    world, every = on_policy(EVEN, MORE_REWARDS), torch.arange(7)[:, None]
    own, reference = (table.detach().view(3, 3).log_softmax(-1) for table in (world.policy, world.reference))
    kl = (reference.exp() * (reference - own)).sum(-1)
    expected = [
        sum(0.3 * float(kl[state]) - float(own[state, token]) for state, token in response) / len(response)
        for response in EVEN.responses
    ]
    assert world.losses(SuperHF(beta=0.3), every).flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_its_expected_gradient_is_that_of_likelihood_of_the_best_and_of_the_forward_kl(size):
    """Of one token; F(y)^n - F(y-)^n is the probability of a face to be the best of n."""
    world, beta = on_policy(DIE), 0.6
    p = world.policy.detach().softmax(-1)
    below = torch.stack([p[world.rewards < reward].sum() for reward in world.rewards])
    best = (below + p) ** size - below**size
    likelihood = -(best * DIE.logps(world.policy).sum(-1)).sum()
    expected = world.gradient(likelihood + beta * world.divergence_of_tokens(forward=True))
    torch.testing.assert_close(world.expected_gradient(SuperHF(beta=beta), size), expected, **EXACT)

"""INPO against its closed forms, by enumeration of a small world, in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor

from moalign.api import Batch, Objective, PairTerms
from moalign.errors import PluginError
from moalign.testing.batch import made_up, plain_terms
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.inpo import INPO
from moalign_plugins.objectives.ipo import IPO

RESPONSES = 5
PAIRS = torch.tensor(list(permutations(range(RESPONSES), 2)))


def drawn(seed: int) -> Tensor:
    """Log-probabilities of all responses."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RESPONSES, generator=generator, dtype=torch.float64).log_softmax(0)


def preferred(seed: int = 9) -> Tensor:
    """P(y > y'), of no order: the game may have cycles."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(RESPONSES, RESPONSES, generator=generator, dtype=torch.float64).triu(1)
    return upper + (1 - upper).T.tril(-1) + 0.5 * torch.eye(RESPONSES, dtype=torch.float64)


def batch_of(policy: Tensor, base: Tensor, reference: Tensor) -> Batch:
    """Every response is one token, and every ordered pair is there, the first one chosen."""
    return Batch(
        logps=policy.log_softmax(0)[:, None],
        mask=torch.ones(RESPONSES, 1, dtype=torch.float64),
        pairs=PAIRS,
        pair_objective=torch.zeros(len(PAIRS), dtype=torch.long),
        preference=torch.ones(RESPONSES, 1, dtype=torch.float64),
        strength=torch.ones(len(PAIRS), dtype=torch.float64),
        groups=torch.zeros(RESPONSES, dtype=torch.long),
        ref_logps=reference[:, None],
        base_logps=base[:, None],
    )


def expected(objective: Objective, policy: Tensor, base: Tensor, reference: Tensor, wins: Tensor) -> Tensor:
    """Of the loss over pairs that the reference sampled, labelled with probability P(first > second)."""
    batch = batch_of(policy, base, reference)
    first, second = PAIRS.T
    weight = reference.exp()[first] * reference.exp()[second] * wins[first, second]
    return (weight * objective.loss(batch, plain_terms(batch))).sum()


def gradient(objective: Objective, policy: Tensor, *about: Tensor) -> Tensor:
    leaf = policy.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(expected(objective, leaf, *about), leaf)
    return found


def closed_form(objective: INPO, base: Tensor, reference: Tensor, wins: Tensor) -> Tensor:
    """exp(P(y > pi_t) / eta) base^q pi_t^(1 - q), normalised; its logarithm."""
    against = wins @ reference.exp()
    anchor = objective.base_share * base + (1 - objective.base_share) * reference
    return (against / objective.eta + anchor).log_softmax(0)


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_all_the_way_to_the_base_it_is_ipo(scale):
    batch = made_up(
        prompts=3,
        tokens=5,
        preference=[0.4, 0.6],
        needs=frozenset({"pairs", "reference", "base"}),
        scored=False,
        seed=2,
        dtype=torch.float64,
    )
    plain = plain_terms(batch)
    terms = PairTerms(scale * plain.scale, plain.margin + 0.3, plain.weight)
    ipo = IPO(beta=0.2).loss(replace(batch, ref_logps=batch.base_logps), terms)
    assert torch.allclose(INPO(eta=0.2, base_share=1.0).loss(batch, terms), ipo, rtol=1e-12, atol=0)
    same = replace(batch, base_logps=batch.ref_logps)
    other = IPO(beta=0.2).loss(batch, terms)
    assert torch.allclose(INPO(eta=0.2, base_share=0.3).loss(same, terms), other, rtol=1e-12, atol=0)
    assert torch.allclose(INPO(eta=0.2, base_share=0.0).loss(batch, terms), other, rtol=1e-12, atol=0)
    assert not torch.allclose(INPO(eta=0.2, base_share=0.3).loss(batch, terms), other)


@pytest.mark.parametrize("share", [0.0, 1 / 3, 1.0])
@pytest.mark.parametrize("eta", [0.3, 1.5])
def test_the_minimiser_over_labelled_pairs_is_the_closed_form(eta, share):
    """The gradient is 0 there and nowhere near, and the loss is a convex quadratic of the logits."""
    objective, base, reference, wins = INPO(eta=eta, base_share=share), drawn(0), drawn(1), preferred()
    best = closed_form(objective, base, reference, wins)
    assert gradient(objective, best, base, reference, wins).abs().max() < 1e-12
    lowest = expected(objective, best, base, reference, wins)
    for seed in range(5):
        other = best + 0.1 * drawn(10 + seed)
        assert expected(objective, other, base, reference, wins) > lowest
        assert gradient(objective, other, base, reference, wins).abs().max() > 1e-3


def minimised(objective: Objective, base: Tensor, reference: Tensor, wins: Tensor) -> Tensor:
    """By one Newton step, which is exact: the loss is quadratic in the logits."""
    start = torch.zeros(RESPONSES, dtype=torch.float64)
    curvature = torch.autograd.functional.hessian(lambda p: expected(objective, p, base, reference, wins), start)
    step = torch.linalg.pinv(curvature) @ gradient(objective, start, base, reference, wins)
    return (start - step).log_softmax(0)


def test_iterates_come_to_the_nash_policy_of_the_game():
    """pi* = base exp(P(y > pi*) / tau), normalised, whatever the game; without the base in the loss they do not."""
    base, wins = drawn(3), preferred()
    objective = INPO(eta=1.5, base_share=0.4)
    tau = objective.eta * objective.base_share
    policy = base
    for _ in range(60):
        policy = minimised(objective, base, policy, wins)
    nash = (wins @ policy.exp() / tau + base).log_softmax(0)
    assert torch.allclose(policy, nash, atol=1e-8)
    away = base
    for _ in range(60):
        away = minimised(INPO(eta=1.5, base_share=0.0), base, away, wins)
    assert (away - policy).abs().max() > 1.0


def test_iterated_dpo_adds_up_the_reward_of_its_rounds():
    """Labels of a Bradley-Terry reward: after t rounds the policy is base exp(t r / beta); with the base as the
    reference of every round it stays base exp(r / beta)."""
    base, reward, beta = drawn(4), 0.5 * drawn(5), 0.4
    wins = (reward[:, None] - reward).sigmoid()
    objective = DPO(beta=beta)
    iterate = base
    for number in range(1, 4):
        after = (base + number * reward / beta).log_softmax(0)
        assert gradient(objective, after, base, iterate, wins).abs().max() < 1e-12
        held = (base + reward / beta).log_softmax(0)
        assert gradient(objective, held, base, base, wins).abs().max() < 1e-12
        assert number == 1 or gradient(objective, after, base, base, wins).abs().max() > 1e-4
        iterate = after


def test_it_needs_both():
    batch = batch_of(drawn(0), drawn(1), drawn(2))
    with pytest.raises(PluginError, match="under the reference and under the base"):
        INPO().loss(replace(batch, base_logps=None), plain_terms(batch))

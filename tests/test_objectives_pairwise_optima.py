"""Pairwise losses in a world that can be enumerated: at the policy that a loss is for, its population loss is at rest.

The optimum is computed from the divergence that holds the policy, not from the loss, and is checked to be one.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy.special import wrightomega
from test_combiners import BETA, at, bradley_terry, judges_of, own_margin, population_loss, world

from moalign.api import PairTerms
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.combiners.modpo import MODPO
from moalign_plugins.objectives.adpo_pairwise import ADPOPairwise
from moalign_plugins.objectives.chi_po import ChiPO
from moalign_plugins.objectives.cpl import CPL
from moalign_plugins.objectives.cpl_kl import CPLKL
from moalign_plugins.objectives.cpo import CPO
from moalign_plugins.objectives.dno import DNO
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.f_dpo import FDPO
from moalign_plugins.objectives.ln_dpo import LengthNormalisedDPO
from moalign_plugins.objectives.rebel import REBEL
from moalign_plugins.objectives.robust_dpo import RobustDPO
from moalign_plugins.objectives.sharpening import Sharpening
from moalign_plugins.objectives.simpo import SimPO
from moalign_plugins.objectives.vpo import VPO

WEIGHTS = [(1.0,), (0.7, 0.3), (0.2, 0.5, 0.3)]
CASES = [(weights, judges) for weights in WEIGHTS for judges in judges_of(weights)]


def kl(first, second):
    return (first * (first / second).log()).sum(-1)


def chi_squared(policy, reference):
    return (policy**2 / reference).sum(-1) - 1


def alpha_divergence(policy, reference, alpha):
    """E_ref[f(u)] with f(u) = (u^(1 - alpha) - (1 - alpha) u - alpha) / (alpha (alpha - 1)), u = policy / reference."""
    moment = (policy ** (1 - alpha) * reference**alpha).sum(-1)
    return (moment - (1 - alpha) - alpha) / (alpha * (alpha - 1))


def twice_jensen_shannon(policy, reference):
    mean = (policy + reference) / 2
    return kl(policy, mean) + kl(reference, mean)


# loss; the divergence; u = policy / reference of x = (reward - lambda) / beta, and the x at which u is infinite
HELD = [
    (FDPO(beta=BETA, divergence="reverse-kl"), kl, torch.exp, math.inf),
    (FDPO(beta=BETA, divergence="forward-kl"), lambda p, q: kl(q, p), lambda x: 1 / (1 - x), 1.0),
    (FDPO(beta=BETA, divergence="js"), twice_jensen_shannon, lambda x: x.exp() / (2 - x.exp()), math.log(2)),
    (
        FDPO(beta=BETA, divergence="alpha", alpha=0.3),
        lambda p, q: alpha_divergence(p, q, 0.3),
        lambda x: (1 - 0.3 * x) ** (-1 / 0.3),
        1 / 0.3,
    ),
    (
        ChiPO(beta=BETA),
        lambda p, q: chi_squared(p, q) / 2 + kl(p, q),
        lambda x: torch.from_numpy(wrightomega(x.numpy() + 1)),  # u + log u = x + 1
        math.inf,
    ),
]


def held_optimum(rewards, reference, ratio, pole):
    """The policy [prompts, responses] with pi = reference * ratio((reward - lambda) / beta), lambda by bisection."""
    base = reference.softmax(1)
    best = rewards.amax(1, keepdim=True)
    low, high = best - BETA * min(pole, 50.0), best.clone()
    for _ in range(200):
        middle = (low + high) / 2
        mass = (base * ratio((rewards - middle) / BETA)).sum(1, keepdim=True)
        low, high = torch.where(mass > 1, middle, low), torch.where(mass > 1, high, middle)
    return base * ratio((rewards - high) / BETA)


@pytest.mark.parametrize(("weights", "judges"), CASES, ids=str)
@pytest.mark.parametrize(("objective", "divergence", "ratio", "pole"), HELD, ids=[repr(case[0]) for case in HELD])
def test_the_minimiser_is_the_policy_that_the_divergence_holds(objective, divergence, ratio, pole, weights, judges):
    rewards, reference, batch = world(weights, judges)
    combined = rewards @ torch.tensor(weights, dtype=torch.float64)
    best = held_optimum(combined, reference, ratio, pole)
    torch.testing.assert_close(best.sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    logits = best.log().requires_grad_()
    policy = logits.softmax(1)
    value = ((policy * combined).sum(1) - BETA * divergence(policy, reference.softmax(1))).sum()
    assert torch.autograd.grad(value, logits)[0].abs().max() < 1e-12  # it is an optimum
    loss = population_loss(objective, MODPO(), at(batch, logits), bradley_terry(batch))
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-12 / min(weights)
    other = (reference + combined / BETA).requires_grad_()  # that of the reverse KL
    elsewhere = population_loss(objective, MODPO(), at(batch, other), bradley_terry(batch))
    moved = torch.autograd.grad(elsewhere, other)[0].abs().max()
    assert moved < 1e-11 if ratio is torch.exp else moved > 1e-4


# loss, how the labels come to be, and the logits of its minimiser from the reference's and the combined rewards / beta
OPTIMA = [
    (DPO(beta=BETA, reference_weight=0.4), bradley_terry, lambda reference, reward: 0.4 * reference + reward),
    (DPO(beta=BETA, reference_weight=0.0), bradley_terry, lambda reference, reward: reward),
    (CPO(beta=BETA, alpha=0.0), bradley_terry, lambda reference, reward: reward),
    (CPL(beta=BETA, lam=1.0), bradley_terry, lambda reference, reward: reward),
    (CPLKL(beta=BETA, lam=1.0), bradley_terry, lambda reference, reward: reference + reward),
    (SimPO(beta=BETA, gamma=0.0), bradley_terry, lambda reference, reward: reward),
    (LengthNormalisedDPO(beta=BETA), bradley_terry, lambda reference, reward: reference + reward),
    (VPO(beta=BETA, alpha=0.0), bradley_terry, lambda reference, reward: reference + reward),
    (
        RobustDPO(beta=BETA, label_smoothing=0.2),
        lambda batch: 0.2 + 0.6 * bradley_terry(batch),  # a fifth of the labels turned round
        lambda reference, reward: reference + reward,
    ),
]


@pytest.mark.parametrize(("weights", "judges"), CASES, ids=str)
@pytest.mark.parametrize(("objective", "probability", "minimiser"), OPTIMA, ids=[repr(case[0]) for case in OPTIMA])
def test_losses_without_another_divergence(objective, probability, minimiser, weights, judges):
    rewards, reference, batch = world(weights, judges)
    combined = rewards @ torch.tensor(weights, dtype=torch.float64)
    for scale, rests in ((1.0, True), (0.8, False)):
        logits = minimiser(reference, scale * combined / BETA).requires_grad_()
        loss = population_loss(objective, MODPO(), at(batch, logits), probability(batch))
        moved = torch.autograd.grad(loss, logits)[0].abs().max()
        assert moved < 1e-12 / min(weights) if rests else moved > 1e-4


def scored(weights=(0.7, 0.3)):
    rewards, reference, batch = world(weights, (0,))
    batch = dataclasses.replace(batch, pair_objective=torch.full_like(batch.pair_objective, -1))
    return rewards @ torch.tensor(weights, dtype=torch.float64), reference, batch


def gradients_of_pairs(objective, batch, logits):
    """The slope of each pair's loss in the log-probability of its first response; [P]."""
    given = at(batch, logits.detach())
    leaf = given.logps.clone().requires_grad_()
    batch = dataclasses.replace(given, logps=leaf)
    losses = objective.loss(batch, Linear().pair_terms(batch))
    slopes = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses]
    return torch.stack([slope[pair[0], 0] for slope, pair in zip(slopes, batch.pairs.tolist(), strict=True)])


@pytest.mark.parametrize(
    ("objective", "temperature"),
    [(DNO(beta=0.3), 0.3), (ADPOPairwise(tau=0.5, beta_r=0.2), 0.4), (REBEL(beta=0.3), 0.3)],
    ids=repr,
)
def test_soft_labels_leave_no_pair_a_slope_at_the_optimum(objective, temperature):
    combined, reference, batch = scored()
    assert objective.beta == pytest.approx(temperature)
    assert gradients_of_pairs(objective, batch, reference + combined / temperature).abs().max() < 1e-14
    assert gradients_of_pairs(objective, batch, reference).abs().min() > 1e-4


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_sharpening_has_no_residual_at_the_sharpened_reference(beta):
    """pi_ref^(1 + 1/beta); every response has one token, so that the average is the same."""
    _, reference, batch = scored()
    for objective in (Sharpening(beta=beta), Sharpening(beta=beta, average=True)):
        batch_at = at(batch, (1 + 1 / beta) * reference)
        terms = Linear().pair_terms(batch_at)
        assert objective.loss(batch_at, terms).max() < 1e-28
        assert objective.loss(at(batch, reference), terms).max() > 1e-2


def test_under_modpo_the_models_own_likelihood_stands_for_the_judges_reward():
    """beta a = w_k log pi_ref + sum of w_j r_j over the others: with two objectives, one of them the judge."""
    rewards, reference, batch = world((0.6, 0.4), (0,))
    logits = reference + (0.6 * reference.log_softmax(1) + 0.4 * rewards[..., 1]) / 0.8
    solved = at(batch, logits)
    assert Sharpening(beta=0.8).loss(solved, MODPO().pair_terms(solved)).max() < 1e-28


def test_labels_of_a_judge_are_not_read_by_sharpening():
    _, reference, batch = world((1.0,), (0,))
    terms = PairTerms(*(torch.full_like(batch.strength, value) for value in (1.0, 0.0, 1.0)))
    there, back = batch.pairs, batch.pairs.flip(1)
    losses = [Sharpening().loss(dataclasses.replace(at(batch, -reference), pairs=p), terms) for p in (there, back)]
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
    assert own_margin(batch).abs().min() > 0  # there would be something to read


def test_the_chi_squared_divergence_is_at_least_the_kl_and_grows_faster():
    """chi2 >= exp(KL) - 1 >= KL, so that its price holds a policy where that of the KL does not."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (3 * torch.randn(2, 500, 6, generator=generator, dtype=torch.float64)).softmax(-1)
    assert (chi_squared(policy, reference) >= kl(policy, reference).exp() - 1 - 1e-12).all()
    assert chi_squared(reference, reference).abs().max() < 1e-14


def test_chi_po_stays_nearer_to_the_reference_than_dpo():
    rewards, reference, _ = world((1.0,), (0,))
    combined = 20 * rewards[..., 0]
    by_kl, by_chi = (held_optimum(combined, reference, HELD[index][2], math.inf) for index in (0, 4))
    base = reference.softmax(1)
    assert ((by_chi / base).amax(1) < (by_kl / base).amax(1)).all()
    assert (kl(by_chi, base) < kl(by_kl, base)).all()

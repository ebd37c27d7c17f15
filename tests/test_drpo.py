"""DRPO as mathematics: what right responses count, what stands against the wrong ones, and the price of going far."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import exp, log

import pytest
import torch
from tabular import REWARDS, SPEECH, on_policy, plain_terms
from torch import Tensor

from moalign.api import Batch
from moalign.testing import check_objective
from moalign_plugins.objectives.drpo import DRPO
from moalign_plugins.objectives.grpo import GRPO

EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1
LENGTHS = [3, 1, 6, 2, 5, 4, 2, 2]
RIGHT = [True, True, True, False, False, False, True, True]
GROUPS = [5, 5, 5, 5, 5, 5, 2, 2]  # all responses to the second prompt are right


def batch_of(gone: float = 0.0, seed: int = 0) -> Batch:
    """``gone``: by how much each token has become less likely since it was sampled."""
    lengths, rows = torch.tensor(LENGTHS), torch.arange(len(LENGTHS))
    mask = (torch.arange(6) < lengths[:, None]).double()
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(mask.shape, generator=generator, dtype=torch.float64) * mask
    return Batch(
        logps=logps.requires_grad_(),
        mask=mask,
        pairs=torch.stack([rows, rows], 1),
        pair_objective=torch.full_like(rows, -1),
        preference=torch.ones(len(rows), 1, dtype=torch.float64),
        strength=torch.ones(len(rows), dtype=torch.float64),
        groups=torch.tensor(GROUPS),
        advantages=torch.tensor([1.0 if right else -1.0 for right in RIGHT], dtype=torch.float64),
        old_logps=logps.detach() + gone * mask,
    )


def scores_of(batch: Batch) -> list[float]:
    return ((batch.logps * batch.mask).sum(-1) / batch.mask.sum(-1)).tolist()


def gradient_of(objective: DRPO, batch: Batch) -> Tensor:
    """Of the mean over the responses to the first prompt, by the mean log-probability of each response."""
    losses = objective.loss(batch, plain_terms(len(LENGTHS)))
    (found,) = torch.autograd.grad(losses[:6].mean(), batch.logps)
    return found.sum(-1)  # a token's share of the mean is 1 / |y|


@pytest.mark.parametrize("options", [{}, {"tau": 0.5, "lam": 3.0}, {"longest": 4}, {"delta": 0.0, "penalty": 2.0}])
def test_it_conforms(options):
    check_objective(DRPO(**options))


@pytest.mark.parametrize("longest", [None, 20])
def test_it_is_the_formula(longest):
    batch, tau, lam = batch_of(), 0.7, 0.3
    scores, most = scores_of(batch), longest or 6
    weights = [exp((1 - LENGTHS[i] / most) / lam) for i in range(3)]
    liked = sum(weight * score for weight, score in zip(weights, scores[:3], strict=True)) / sum(weights)
    expected = -(liked - tau * log(sum(exp(score / tau) for score in scores[3:6]) / 3))
    losses = DRPO(tau=tau, lam=lam, longest=longest).loss(batch, plain_terms(len(LENGTHS)))
    assert losses[:6].mean().item() == pytest.approx(expected, abs=1e-13)
    assert losses[6:].tolist() == [0.0, 0.0]  # and they stand in the mean over the step


def test_the_gradient_is_that_of_the_surrogate_in_the_authors_code():
    """There each exp(s / tau) is divided by the fixed mean of them: another value, and the slope of tau log mean."""
    batch, tau = batch_of(), 0.7
    found = gradient_of(DRPO(tau=tau, lam=0.3), batch)
    scores = torch.tensor(scores_of(batch), dtype=torch.float64, requires_grad=True)
    exponentials = (scores[3:6] / tau).exp()
    surrogate = tau * (exponentials / exponentials.mean().detach()).mean()
    (expected,) = torch.autograd.grad(surrogate, scores)
    torch.testing.assert_close(found[3:6], expected[3:6], **EXACT)
    torch.testing.assert_close(found[3:6], (scores.detach()[3:6] / tau).softmax(0), **EXACT)
    assert surrogate.item() == pytest.approx(tau) != tau * exponentials.mean().log().item()


def weights(lam: float) -> Tensor:
    return -gradient_of(DRPO(lam=lam), batch_of())[:3]


def test_the_weights_of_right_responses_are_the_best_for_shortness_and_the_kl_from_uniform():
    lam, reward = 0.3, 1 - torch.tensor(LENGTHS[:3], dtype=torch.float64) / 6

    def value(shares: Tensor) -> float:
        return float((shares * reward).sum() - lam * (shares * (3 * shares).log()).sum())

    own = weights(lam)
    assert own.sum().item() == pytest.approx(1, abs=1e-12)
    assert value(own) == pytest.approx(
        lam * float((reward / lam).exp().mean().log()), abs=1e-12
    )  # the largest there is
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = torch.rand(3, generator=generator, dtype=torch.float64) + 1e-3
        assert value(other / other.sum()) < value(own)


def test_with_much_temper_all_right_responses_count_the_same_and_with_little_the_shortest_alone():
    torch.testing.assert_close(weights(1e9), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(weights(1e-3), torch.tensor([0.0, 1.0, 0.0]).double(), rtol=0, atol=1e-12)


def test_a_right_response_that_is_long_never_counts_against_itself():
    """With a price of length in the reward, GRPO has it so: 0.2 is less than the mean of all."""
    assert (weights(0.1) > 0).all()
    rewards = torch.tensor([1, 0.9, 0.2, 0, 0, 1], dtype=torch.float64)
    groups = torch.zeros(6, dtype=torch.long)
    assert GRPO().advantages(rewards, groups, None)[2].item() == pytest.approx(-0.63, abs=5e-3)
    assert DRPO(threshold=0.1).advantages(rewards, groups, None).tolist() == [1, 1, 1, -1, -1, 1]


def test_what_has_gone_further_than_delta_is_pulled_back():
    """penalty (KL - delta) times the gradient of KL, which is -1 / 21 for each of the first prompt's tokens."""
    batch, objective = batch_of(gone=0.03), DRPO(delta=0.01, penalty=50.0)
    near = batch_of(gone=0.005)
    terms = plain_terms(len(LENGTHS))
    torch.testing.assert_close(objective.loss(near, terms), objective.loss(batch_of(), terms), **EXACT)
    extra = objective.loss(batch, terms) - objective.loss(batch_of(), terms)
    torch.testing.assert_close(extra, torch.full_like(extra, 25 * 0.02**2), **EXACT)
    (pulled,) = torch.autograd.grad(objective.loss(batch, terms)[:6].mean(), batch.logps)
    at_rest = batch_of()
    (rest,) = torch.autograd.grad(objective.loss(at_rest, terms)[:6].mean(), at_rest.logps)
    expected = -50 * 0.02 / 21 * batch.mask
    expected[6:] = 0
    torch.testing.assert_close(pulled - rest, expected, **EXACT)


def test_its_expected_gradient_is_that_of_its_own_estimator():
    """-E[omega-weighted mean of right scores - mean of wrong scores, weighed by softmax], by plain Python."""
    world, size, tau, lam = on_policy(SPEECH), 3, 0.5, 0.4
    logps = SPEECH.logps(world.policy)
    lengths = [len(response) for response in SPEECH.responses]
    slopes = [world.gradient(SPEECH.logps(world.policy)[y].sum() / lengths[y]) for y in range(6)]
    scores = [float(logps[y].detach().sum()) / lengths[y] for y in range(6)]
    total = torch.zeros_like(world.policy)
    for drawn in product(range(6), repeat=size):
        right = [y for y in drawn if REWARDS[y] > 0.35]
        wrong = [y for y in drawn if REWARDS[y] <= 0.35]
        if right and wrong:
            probability = float(logps.detach().sum(-1)[list(drawn)].sum().exp())
            liked = [exp((1 - lengths[y] / 2) / lam) for y in right]
            feared = [exp(scores[y] / tau) for y in wrong]
            for y, weight in zip(right, liked, strict=True):
                total -= probability * weight / sum(liked) * slopes[y]
            for y, weight in zip(wrong, feared, strict=True):
                total += probability * weight / sum(feared) * slopes[y]
    found = world.expected_gradient(DRPO(tau=tau, lam=lam, longest=2, threshold=0.35), size)
    torch.testing.assert_close(found, total, **EXACT)
    assert total.abs().max() > 0.05


def test_a_combiners_multiplier_scales_it():
    batch, terms = batch_of(), plain_terms(len(LENGTHS))
    assert batch.advantages is not None
    twice = replace(batch, advantages=2 * batch.advantages)
    torch.testing.assert_close(DRPO().loss(twice, terms), 2 * DRPO().loss(batch, terms), **EXACT)

"""Losses that see all responses to a prompt: identities with DPO and each other, and what minimises them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tabular import REWARDS, SPEECH, plain_terms
from tabular_responses import batch_of, minimised, offline
from torch import Tensor

from moalign.api import Batch, PluginError
from moalign_plugins.objectives.adpo import ADPO
from moalign_plugins.objectives.brain import BRAIn
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.order_preserving import OrderPreserving, shares
from moalign_plugins.objectives.trajectory_balance import TrajectoryBalance

EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1
ALL = torch.arange(6)
POLICY, REFERENCE, SAMPLER = (SPEECH.parameters(seed) for seed in (0, 1, 2))
BETA = 0.6


def value(objective, signal: Tensor, policy: Tensor, rows: Tensor = ALL, **more) -> Tensor:
    """The mean loss of these responses to one prompt, written by the reference."""
    reference = REFERENCE if "reference" in objective.wants else None
    batch = batch_of(SPEECH, policy, rows, offline(objective, signal[rows]), reference=reference, **more)
    return objective.loss(batch, plain_terms(len(rows))).mean()


def gradient(of: Tensor, policy: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(of, policy)
    return found


def optimum() -> Tensor:
    return (SPEECH.logps(REFERENCE.detach()).sum(-1) + REWARDS / BETA).log_softmax(-1)


# --- adpo -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("target", ["best", "softmax"])
def test_two_responses_are_dpo_with_beta_one_over_tau(tau, target):
    """With the best alone; and label-smoothed DPO where the target is soft: q = (p, 1 - p)."""
    signal = torch.tensor([0.0, 0.9, 0.0, 0.2, 0.0, 0.0], dtype=torch.float64)
    rows = torch.tensor([1, 3])
    objective = ADPO(target=target, tau=tau, beta=BETA)
    p = float(offline(objective, signal[rows])[0])
    assert p == 1 if target == "best" else 0.5 < p < 1
    batch = batch_of(SPEECH, POLICY, rows, signal[rows], reference=REFERENCE)
    pair = replace(batch, pairs=torch.tensor([[0, 1]]), pair_objective=torch.zeros(1, dtype=torch.long))
    expected = DPO(beta=1 / tau, label_smoothing=1 - p).loss(pair, plain_terms(1))
    torch.testing.assert_close(value(objective, signal, POLICY, rows), expected.squeeze(), **EXACT)


@pytest.mark.parametrize("make", [lambda: ADPO(beta=BETA, tau=1.7), lambda: BRAIn(beta=BETA)])
def test_the_optimum_has_no_gradient_and_is_reached_from_any_responses(make):
    """Whatever part of the responses is there; over all of them nothing else is the minimum."""
    objective = make()
    for rows in (ALL, torch.tensor([0, 2, 5]), torch.tensor([3, 3, 1])):
        there = SPEECH.fitted(optimum())
        assert gradient(value(objective, REWARDS, there, rows), there).abs().max() < 1e-12
    reached = minimised(SPEECH, POLICY, lambda policy: value(objective, REWARDS, policy))
    torch.testing.assert_close(SPEECH.logps(reached).sum(-1), optimum(), rtol=0, atol=1e-5)


def test_trajectory_balance_comes_to_the_same_optimum_from_the_responses_of_a_file():
    objective = TrajectoryBalance(beta=BETA)
    reached = minimised(SPEECH, POLICY, lambda policy: value(objective, REWARDS, policy))
    torch.testing.assert_close(SPEECH.logps(reached).sum(-1), optimum(), rtol=0, atol=1e-5)


def test_a_shift_of_all_log_ratios_or_rewards_changes_nothing():
    objective = ADPO(beta=BETA)
    batch = batch_of(SPEECH, POLICY, ALL, offline(objective, REWARDS), reference=REFERENCE)
    shift = torch.zeros_like(batch.logps)
    shift[:, 0] = 0.8
    before, after = (
        objective.loss(each, plain_terms(6)) for each in (batch, replace(batch, logps=batch.logps + shift))
    )
    torch.testing.assert_close(before, after, **EXACT)
    torch.testing.assert_close(offline(objective, REWARDS), offline(objective, REWARDS + 7), **EXACT)


def test_a_target_that_is_the_policys_own_choice_has_no_gradient():
    objective = ADPO(tau=1.3)
    batch = batch_of(SPEECH, POLICY, ALL, REWARDS, reference=REFERENCE)
    own = ((batch.logps - batch.ref_logps).sum(-1) / 1.3).softmax(-1).detach()
    found = objective.loss(replace(batch, advantages=own), plain_terms(6)).mean()
    assert gradient(found, POLICY).abs().max() < 1e-12
    entropy = -(own * own.log()).sum()
    torch.testing.assert_close(found.detach(), entropy, **EXACT)


def test_of_equal_rewards_the_earlier_response_is_the_best():
    groups = torch.tensor([4, 1, 4, 1, 4])
    signal = torch.tensor([0.2, 0.7, 0.9, 0.7, 0.9], dtype=torch.float64)
    assert offline(ADPO(target="best"), signal, groups).tolist() == [0, 1, 1, 0, 0]


# --- brain ----------------------------------------------------------------------------------------------------------


def sampled(objective, policy: Tensor, rows: Tensor) -> tuple[Batch, Tensor]:
    """A round that ``SAMPLER`` gave, as the engine hands it over."""
    old, reference = (SPEECH.logps(each.detach())[rows].sum(-1) for each in (SAMPLER, REFERENCE))
    groups = torch.zeros(len(rows), dtype=torch.long)
    weights = objective.advantages(REWARDS[rows], groups, old - reference)
    return batch_of(SPEECH, policy, rows, weights, reference=REFERENCE, old=SAMPLER), old


@pytest.mark.parametrize("proposal", ["reference", "sampler"])
def test_the_gradient_is_that_of_the_paper_and_of_adpo_with_its_weights(proposal):
    objective, rows = BRAIn(beta=BETA, proposal=proposal), torch.tensor([0, 1, 1, 4, 5])
    batch, old = sampled(objective, POLICY, rows)
    written = old if proposal == "sampler" else SPEECH.logps(REFERENCE.detach())[rows].sum(-1)
    target = SPEECH.logps(REFERENCE.detach())[rows].sum(-1) + REWARDS[rows] / BETA
    alpha, own = (target - written).softmax(-1), batch.logps.sum(-1)
    held = (own - written).softmax(-1).detach()
    expected = gradient(-((alpha - held) * own).sum(), POLICY)
    batch, _ = sampled(objective, POLICY, rows)
    torch.testing.assert_close(gradient(objective.loss(batch, plain_terms(5)).mean(), POLICY), expected, **EXACT)
    anchored = ADPO(anchor=proposal, tau=1.0)
    batch = replace(sampled(objective, POLICY, rows)[0], advantages=alpha)
    torch.testing.assert_close(gradient(anchored.loss(batch, plain_terms(5)).mean(), POLICY), expected, **EXACT)
    assert expected.abs().max() > 0.05


def test_the_optimum_is_a_fixed_point_whoever_sampled():
    """With the sampler as proposal; where the reference is taken for it, and was not, it is one as well."""
    there = SPEECH.fitted(optimum())
    for proposal in ("sampler", "reference"):
        batch, _ = sampled(BRAIn(beta=BETA, proposal=proposal), there, ALL)
        found = BRAIn(beta=BETA, proposal=proposal).loss(batch, plain_terms(6)).mean()
        assert gradient(found, there).abs().max() < 1e-12


# --- order-preserving -----------------------------------------------------------------------------------------------

TWO = torch.tensor([[1.0, 0.0], [0.2, 0.1], [0.0, 1.0], [0.6, 0.6], [0.6, 0.5], [1.0, -1.0]], dtype=torch.float64)
FRONT = torch.tensor([1.0, 0, 1, 1, 0, 0], dtype=torch.float64) / 3
EVEN = torch.full((6, 2), 0.5, dtype=torch.float64)
GROUP = torch.zeros(6, dtype=torch.long)


def test_shares_are_of_the_responses_that_none_dominates():
    assert shares(TWO, EVEN, GROUP).tolist() == pytest.approx(FRONT.tolist())
    equal = shares(TWO[[0, 0, 5]], EVEN[:3], GROUP[:3])
    assert equal.tolist() == [0.5, 0.5, 0]
    apart = shares(TWO, EVEN, torch.tensor([0, 1, 1, 0, 1, 1]))
    assert apart.tolist() == pytest.approx([0.5, 0, 1 / 3, 0.5, 1 / 3, 1 / 3])
    assert shares(TWO[:1], EVEN[:1], GROUP[:1]).tolist() == [1]


def test_a_monotone_map_of_an_objective_changes_nothing_and_weights_say_what_counts():
    mapped = torch.stack([(3 * TWO[:, 0]).exp(), TWO[:, 1] ** 3 - 5], 1)
    assert torch.equal(shares(mapped, EVEN, GROUP), shares(TWO, EVEN, GROUP))
    only = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(6, 2)
    assert shares(TWO, only, GROUP).tolist() == [0.5, 0, 0, 0, 0, 0.5]
    less = torch.tensor([0.6, -0.8], dtype=torch.float64).expand(6, 2)
    assert shares(TWO, less, GROUP).tolist() == [0, 0, 0, 0, 0, 1]
    for wrong, reason in ((EVEN * torch.nan, "no thresholds"), (EVEN, "unknown")):
        with pytest.raises(PluginError, match=reason):
            shares(TWO.masked_fill(TWO == 0.2, torch.nan), wrong, GROUP)


@pytest.mark.parametrize("relative", [False, True])
def test_the_optimum_has_all_mass_on_the_front_in_equal_parts_or_in_those_of_the_reference(relative):
    objective = OrderPreserving(relative=relative)
    written = SPEECH.logps(REFERENCE.detach()).sum(-1).exp()
    expected = FRONT * (written if relative else 1)
    expected = expected / expected.sum()

    def loss(policy: Tensor) -> Tensor:
        return value(objective, REWARDS, policy, rewards=TWO, preference=EVEN)

    near = (0.999999 * expected + 1e-6 / 6).log()  # the optimum itself has logits without bounds
    there = SPEECH.fitted(near - near.logsumexp(-1))
    assert gradient(loss(there), there).abs().max() < 1e-4
    reached = SPEECH.logps(minimised(SPEECH, POLICY, loss, steps=60)).sum(-1).exp()
    torch.testing.assert_close(reached, expected, rtol=0, atol=2e-3)

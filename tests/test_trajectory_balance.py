"""Trajectory balance: where it is zero, what its gradient is, the log Z that it learns, and a sweep of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tabular import DIE, REWARDS, SPEECH, Language, Situation, on_policy, plain_terms
from torch import Tensor
from value_heads import settings_of, write_prompts

from moalign import registry
from moalign.api import Batch, PairTerms, PluginError, Preference
from moalign.engine.advantages import Advantages
from moalign.sweeps import front, run
from moalign.sweeps.observe import Observer
from moalign.testing import check_objective
from moalign_plugins.combiners.chebyshev import Chebyshev
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.objectives.rebel import REBEL
from moalign_plugins.objectives.reinforce import REINFORCE
from moalign_plugins.objectives.trajectory_balance import MOST_OBJECTIVES, TrajectoryBalance, thermometer

BETA = 0.3
EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1
FORMS: list[dict[str, Any]] = [{"log_z": "group"}, {"log_z": "learned", "bins": 5, "width": 3}]


def optimum(language: Language, reference: Tensor, rewards: Tensor, beta: float = BETA) -> tuple[Tensor, Tensor]:
    """log-probabilities [R] of reference * exp(rewards / beta) / Z, and log Z."""
    raw = language.logps(reference.detach()).sum(-1) + rewards / beta
    return raw.log_softmax(-1), raw.logsumexp(-1)


def at_optimum(world: Situation) -> Situation:
    best, _ = optimum(world.language, world.reference, world.rewards)
    return replace(world, policy=world.language.fitted(best))


def batch_of(
    logps: Tensor, mask: Tensor, reference: Tensor, rewards: Tensor, preference: Tensor, own: Mapping[str, Tensor]
) -> Batch:
    """Rows that are one group unless the preference changes."""
    rows = torch.arange(len(logps))
    _, groups = preference.unique(dim=0, return_inverse=True)
    return Batch(
        logps=logps,
        mask=mask,
        pairs=rows[:, None].expand(-1, 2),
        pair_objective=torch.full_like(rows, -1),
        preference=preference,
        strength=torch.ones(len(rows), dtype=torch.float64),
        groups=groups,
        ref_logps=reference,
        advantages=rewards,
        parameters=own,
    )


def network(objective: TrajectoryBalance, seed: int = 0) -> dict[str, Tensor]:
    first = objective.parameters(8, torch.Generator().manual_seed(seed))
    return {name: value.double().requires_grad_() for name, value in first.items()}


# --- the fixed point ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", [SPEECH, DIE])
def test_all_losses_are_zero_at_the_optimum_and_not_elsewhere(language):
    world, every = on_policy(language), torch.arange(len(language.responses))[None]
    objective = TrajectoryBalance(beta=BETA)
    assert at_optimum(world).losses(objective, every).max() < 1e-24
    assert world.losses(objective, every).min() > 1e-4
    assert at_optimum(world).losses(TrajectoryBalance(beta=2 * BETA), every).max() > 1e-2


def test_it_is_a_fixed_point_whoever_sampled():
    """Groups of another policy's responses have no gradient there, and REINFORCE's have, but for its ratio."""
    world = at_optimum(replace(on_policy(SPEECH), sampler=SPEECH.parameters(7)))
    assert world.expected_gradient(TrajectoryBalance(beta=BETA), 3).abs().max() < 1e-12
    away = replace(world, policy=SPEECH.parameters(3))
    assert away.expected_gradient(TrajectoryBalance(beta=BETA), 3).abs().max() > 1e-2


def test_with_a_uniform_reference_it_is_the_loss_of_the_paper():
    """(log Z + sum log P_F - b log R_w)^2 with b = 1 / beta and R_w the weighted sum of rewards, arXiv 2210.12765."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand((6, 2), generator=generator, dtype=torch.float64) + 0.1
    weighted = rewards @ torch.tensor([0.3, 0.7], dtype=torch.float64)
    logps, exponent, log_z = SPEECH.logps(SPEECH.parameters(0)).sum(-1).detach(), 1 / BETA, 0.4
    paper = (log_z + logps - exponent * weighted.log()) ** 2
    objective = TrajectoryBalance(beta=BETA, **FORMS[1])
    own = network(objective)
    own["log_z.second_bias"] = torch.full((1,), BETA * (log_z - log(6)), dtype=torch.float64)  # of the prior 1 / 6
    uniform, ones = torch.full((6, 1), -log(6), dtype=torch.float64), torch.ones(6, 1, dtype=torch.float64)
    preference = torch.tensor([[0.3, 0.7]], dtype=torch.float64).expand(6, -1)
    batch = batch_of(logps[:, None], ones, uniform, weighted.log(), preference, own)
    found = objective.loss(batch, plain_terms(6)) / BETA**2
    torch.testing.assert_close(found.detach(), paper, **EXACT)


def test_the_loss_of_a_group_is_that_of_rebel_over_its_pairs():
    """Their mean times (G - 1) / 2 G: both are the variance of the residuals, in the same units."""
    world, size = on_policy(SPEECH), 4
    rows = torch.tensor([0, 2, 5, 1])
    mine = world.losses(TrajectoryBalance(beta=BETA), rows[None]).mean()
    pairs = torch.tensor(list(combinations(range(size), 2)))
    logps, reference = SPEECH.logps(world.policy)[rows], SPEECH.logps(world.reference.detach())[rows]
    preference = torch.ones(size, 1, dtype=torch.float64)
    batch = replace(batch_of(logps, SPEECH.mask[rows], reference, REWARDS[rows], preference, {}), pairs=pairs)
    difference = REWARDS[rows][pairs[:, 0]] - REWARDS[rows][pairs[:, 1]]
    one = torch.ones(len(pairs), dtype=torch.float64)
    rebel = REBEL(beta=BETA).loss(batch, PairTerms(one, one * 0, one, difference)).mean()
    torch.testing.assert_close(mine, (size - 1) / (2 * size) * rebel, **EXACT)


# --- the gradient ---------------------------------------------------------------------------------------------------


def divergence_from_optimum(world: Situation) -> Tensor:
    """KL(policy || optimum) of whole responses."""
    best, _ = optimum(world.language, world.reference, world.rewards)
    return world.expected(lambda own, reference: own.sum(-1) - best)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("language", [SPEECH, DIE])
def test_the_expected_gradient_of_a_group_is_that_of_the_kl_from_the_optimum(language, size):
    """Times 2 beta^2 (G - 1) / G; so 2 beta times what REINFORCE has with the group's mean as baseline."""
    world = on_policy(language)
    found = world.expected_gradient(TrajectoryBalance(beta=BETA), size)
    wanted = world.gradient(divergence_from_optimum(world))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found, 2 * BETA**2 * (size - 1) / size * wanted, **EXACT)
    reinforce = world.expected_gradient(REINFORCE(beta=BETA), size)
    torch.testing.assert_close(found, 2 * BETA * reinforce, **EXACT)


@pytest.mark.parametrize("seed", [0, 1])
def test_with_a_learned_log_z_it_is_that_without_the_factor_whatever_the_network_says(seed):
    world, objective = on_policy(SPEECH), TrajectoryBalance(beta=BETA, log_z="learned", bins=5, width=3)
    own = network(objective, seed)
    own["log_z.second"] = torch.full((3,), 0.7, dtype=torch.float64)
    logps, reference = SPEECH.logps(world.policy), SPEECH.logps(world.reference.detach())
    preference = torch.tensor([[0.2, 0.8]], dtype=torch.float64).expand(6, -1)
    batch = batch_of(logps, SPEECH.mask, reference, REWARDS, preference, own)
    assert objective.value(preference, own).abs().min() > 1e-2
    losses = objective.loss(batch, plain_terms(6))
    found = world.gradient((logps.sum(-1).exp().detach() * losses).sum())
    torch.testing.assert_close(found, 2 * BETA**2 * world.gradient(divergence_from_optimum(world)), **EXACT)


def test_a_mean_without_a_gradient_gives_the_same_step():
    """The residuals sum to 0, so that what the mean's own gradient adds is 0 too: arXiv 2010.10436."""
    world, rows = on_policy(SPEECH), torch.tensor([[0, 2, 5], [1, 1, 4]])
    objective = TrajectoryBalance(beta=BETA)
    found = world.gradient(world.losses(objective, rows).sum())
    ratios = (SPEECH.logps(world.policy) - SPEECH.logps(world.reference.detach())).sum(-1)
    log_z = (REWARDS / BETA - ratios)[rows].mean(1, keepdim=True).detach()
    by_hand = BETA**2 * (log_z + ratios[rows] - REWARDS[rows] / BETA) ** 2
    torch.testing.assert_close(found, world.gradient(by_hand.sum()), **EXACT)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["log_z"])
def test_gradcheck(form):
    objective = TrajectoryBalance(beta=BETA, **form)
    own = network(objective)
    if own:
        own["log_z.second"] = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64, requires_grad=True)
    preference = torch.tensor([[0.25, 0.75]] * 3 + [[1.0, 0.0]] * 3, dtype=torch.float64)
    reference = SPEECH.logps(SPEECH.parameters(1)).detach()

    def losses(logps, *values):
        named = dict(zip(own, values, strict=True))
        return objective.loss(batch_of(logps, SPEECH.mask, reference, REWARDS, preference, named), plain_terms(6))

    logps = SPEECH.logps(SPEECH.parameters(0)).detach().requires_grad_()
    assert torch.autograd.gradcheck(losses, (logps, *own.values()))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["log_z"])
def test_it_conforms(form):
    check_objective(TrajectoryBalance(beta=BETA, **form))


# --- log Z ----------------------------------------------------------------------------------------------------------

PREFERENCES = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.1, 0.9], [0.0, 1.0]], dtype=torch.float64)
BOTH = torch.stack([REWARDS, torch.tensor([0.8, 1.1, -0.4, 0.2, 0.6, -0.9], dtype=torch.float64)], 1)


def learnt(objective: TrajectoryBalance) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The policy of each preference [K,R], the network, and the losses, after training on all responses for all of
    them at once, which are the samples of nobody in particular."""
    tables = [SPEECH.parameters(10 + number) for number in range(len(PREFERENCES))]
    own, reference = network(objective), SPEECH.logps(SPEECH.parameters(1)).detach()
    preference = PREFERENCES.repeat_interleave(6, 0)
    signal = Linear().signal(BOTH.repeat(len(PREFERENCES), 1), preference, preference[:, 0], {})
    precise: dict[str, Any] = {"tolerance_grad": 1e-7, "tolerance_change": 1e-14, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([*tables, *own.values()], max_iter=300, history_size=30, **precise)

    def losses() -> Tensor:
        logps = torch.cat([SPEECH.logps(table) for table in tables])
        mask, ref_logps = (each.repeat(len(tables), 1) for each in (SPEECH.mask, reference))
        return objective.loss(batch_of(logps, mask, ref_logps, signal, preference, own), plain_terms(len(logps)))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = losses().mean()
        value.backward()
        return value

    optimizer.step(closure)
    policies = torch.stack([SPEECH.logps(table).sum(-1) for table in tables]).detach()
    return policies, {name: value.detach() for name, value in own.items()}, losses().detach()


@pytest.mark.parametrize("code", ["thermometer", "weights"])
def test_the_network_learns_log_z_of_each_preference_and_the_policies_their_optima(code):
    """The one-hot preferences among them: there it is the log Z of one objective alone."""
    objective = TrajectoryBalance(beta=BETA, log_z="learned", code=code, bins=20, width=8)
    policies, own, losses = learnt(objective)
    exact = [optimum(SPEECH, SPEECH.parameters(1), BOTH @ weights) for weights in PREFERENCES]
    assert losses.max() < 1e-8
    log_z = torch.stack([value for _, value in exact])
    torch.testing.assert_close(objective.value(PREFERENCES, own) / BETA, log_z, rtol=0, atol=1e-3)
    assert log_z.max() - log_z.min() > 0.5
    torch.testing.assert_close(policies, torch.stack([best for best, _ in exact]), rtol=0, atol=1e-3)
    alone, _ = optimum(SPEECH, SPEECH.parameters(1), REWARDS)
    torch.testing.assert_close(policies[0], alone, rtol=0, atol=1e-3)


def test_the_responses_of_a_group_tell_log_z_without_a_network():
    """At the optimum any of them does, exactly."""
    policies, own, losses = learnt(TrajectoryBalance(beta=BETA))
    assert not own and losses.max() < 1e-8
    reference = SPEECH.logps(SPEECH.parameters(1)).detach().sum(-1)
    for weights, policy in zip(PREFERENCES, policies, strict=True):
        best, log_z = optimum(SPEECH, SPEECH.parameters(1), BOTH @ weights)
        torch.testing.assert_close(policy, best, rtol=0, atol=1e-3)
        said = BOTH @ weights / BETA - (policy - reference)
        torch.testing.assert_close(said, log_z.expand(6), rtol=0, atol=1e-3)


def test_before_any_training_the_network_says_nothing():
    objective = TrajectoryBalance(log_z="learned")
    assert not objective.value(PREFERENCES, network(objective)).any()
    assert not TrajectoryBalance().parameters(8, torch.Generator())
    assert {objective.lr_factor(name) for name in network(objective)} == {10.0}


# --- the code of a preference ---------------------------------------------------------------------------------------


def test_a_thermometer_fills_up_from_below():
    values = torch.linspace(0, 1, 201, dtype=torch.float64)
    codes = thermometer(values, 50)
    assert codes.shape == (201, 50) and codes.min() == 0 and codes.max() == 1
    assert (codes.diff(dim=0) >= 0).all()  # a larger weight empties no part
    assert (codes.diff(dim=1) <= 0).all()  # none fills before the ones below
    torch.testing.assert_close(codes.sum(-1), 50 * values, **EXACT)
    assert not codes[0].any() and bool((codes[-1] == 1).all())
    assert thermometer(torch.tensor(0.25), 4).tolist() == [1, 0, 0, 0]


def test_a_negative_component_fills_the_thermometer_with_its_sign():
    values = torch.arange(-20, 21, dtype=torch.float64) / 20
    codes = thermometer(values, 7)
    assert torch.equal(codes.flip(0), -codes) and (codes.diff(dim=0) >= 0).all()


def test_what_the_network_cannot_read_is_refused():
    objective = TrajectoryBalance(log_z="learned", width=2)
    own = network(objective)
    for unreadable in ([0.3, float("nan")], [0.3, 20.0]):
        with pytest.raises(PluginError, match=r"weights or a direction.*no thresholds; use log_z: group"):
            objective.value(torch.tensor([unreadable], dtype=torch.float64), own)
    many = torch.full((1, MOST_OBJECTIVES + 1), 1 / (MOST_OBJECTIVES + 1), dtype=torch.float64)
    with pytest.raises(PluginError, match=f"room for {MOST_OBJECTIVES} objectives, there are {MOST_OBJECTIVES + 1}"):
        objective.value(many, own)


# --- what it is given -----------------------------------------------------------------------------------------------


def test_a_better_response_has_the_larger_signal_under_chebyshev():
    """The trap of the paper's code: a distance from the best, taken as a reward, makes the worst responses likely."""
    rewards = np.array([[0.9, 0.8], [0.3, 0.2], [0.6, 0.7]])
    even = Preference("weights", {"a": 0.5, "b": 0.5})
    rule = Advantages(TrajectoryBalance(), Chebyshev(), even, ("a", "b"), "c")
    signal = rule.of(0, rewards, np.zeros(3, dtype=np.int64), np.zeros(3))[0]
    assert signal[0] > signal[2] > signal[1]


def test_one_hot_weights_are_one_objective():
    groups = np.zeros(6, dtype=np.int64)
    for place, only in enumerate(np.eye(2)):
        preference = Preference("weights", dict(zip(("a", "b"), only.tolist(), strict=True)))
        rule = Advantages(TrajectoryBalance(), Linear(), preference, ("a", "b"), "c")
        np.testing.assert_array_equal(rule.of(0, BOTH.numpy(), groups, np.zeros(6))[0], BOTH[:, place].numpy())


# --- a sweep --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.mark.parametrize("form", ["group", "learned"])
def test_one_model_is_trained_for_drawn_preferences(form, tiny_model_path, prompts, tmp_path, monkeypatch):
    seen: list[Batch] = []
    plain = TrajectoryBalance.loss

    def looking(self, batch, terms):
        seen.append(batch)
        return plain(self, batch, terms)

    monkeypatch.setattr(TrajectoryBalance, "loss", looking)
    loss = {"name": "trajectory-balance", "log_z": form}
    settings = settings_of(tiny_model_path, prompts, loss=loss, condition={"name": "soup"})
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    points = front.read(tmp_path / "run")["points"]
    assert [point["kind"] for point in points] == ["trained"] + ["conditioned"] * 3
    assert len({tuple(row) for step in seen for row in step.preference.tolist()}) > 10
    words = []
    for step in seen:
        assert step.preference.shape == (len(step.logps), 2)
        for group in step.groups.unique():
            own = step.groups == group
            assert int(own.sum()) == 3 and len(step.preference[own].unique(dim=0)) == 1
        distances = step.preference[:, 0] - step.preference[:, 1]  # one objective wants many words, the other few
        words += (step.advantages / distances).tolist()
    assert words == pytest.approx([round(each) for each in words], abs=1e-3) and len(set(map(round, words))) > 1
    kept = tmp_path / "run" / "candidates" / "model" / "objective.safetensors"
    assert kept.exists() == (form == "learned")
    if form == "learned":
        values = load_file(kept)
        assert bool(values["log_z.second_bias"].any()) and bool(values["log_z.second"].any())

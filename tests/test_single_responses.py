"""Losses on responses one by one: their values, what minimises them, and their limits, in float64."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from math import exp, log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tabular import DIE, REWARDS, SPEECH, plain_terms
from tabular_responses import batch_of, minimised, offline
from torch import Tensor
from trl import KTOTrainer

from moalign.api import PluginError
from moalign.testing import check_objective
from moalign_plugins.objectives.advantage_weighted import AdvantageWeighted
from moalign_plugins.objectives.filtered import Filtered
from moalign_plugins.objectives.kto import KTO
from moalign_plugins.objectives.reward_weighted import RewardWeighted
from moalign_plugins.objectives.sft import SFT
from moalign_plugins.objectives.unlikelihood import LEAST, Unlikelihood

EXACT = {"rtol": 0, "atol": 1e-12}  # sums of a few hundred float64 of size 1
ALL = torch.arange(6)
POLICY, REFERENCE = SPEECH.parameters(0), SPEECH.parameters(1)
LABELS = torch.tensor([1.0, 0, 0, 1, 0, 1], dtype=torch.float64)
ONE = plain_terms(6)


def losses(objective, signal: Tensor, policy: Tensor = POLICY, groups: Tensor | None = None, **more) -> Tensor:
    reference = REFERENCE if "reference" in objective.wants else None
    advantages = offline(objective, signal, groups)
    batch = batch_of(SPEECH, policy, ALL, advantages, groups, reference=reference, **more)
    return objective.loss(batch, ONE)


def likelihood(policy: Tensor = POLICY, average: bool = True) -> Tensor:
    return SFT(average=average).loss(batch_of(SPEECH, policy, ALL, LABELS), ONE)


# --- kto ------------------------------------------------------------------------------------------------------------


def trl_kto(policy: Tensor, reference: Tensor, labels: Tensor, kind: str, kl: Tensor, **weights: float) -> Tensor:
    """``KTOTrainer._compute_loss`` on a stand-in for the trainer, with a model that returns ``policy`` [N,T].

    ``kl`` [N]: log-ratios behind other prompts.
    """
    number, width = policy.shape
    shifted = torch.zeros(number, width + 1, dtype=policy.dtype)
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        args=SimpleNamespace(),
        loss_type=kind,
        beta=weights["beta"],
        desirable_weight=weights["desirable"],
        undesirable_weight=weights["undesirable"],
        calculate_KL=kind == "kto",
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: kl,
    )
    outputs = SimpleNamespace(log_probs=policy, entropy=policy.detach(), mean_logits=policy.detach())
    inputs = {
        "input_ids": shifted.long(),
        "attention_mask": torch.ones_like(shifted).long(),
        "completion_mask": torch.ones_like(shifted).long(),
        "label": labels.bool(),
        "ref_logps": reference.sum(1),
        "ref_KL_logps": kl * 0,
    }
    return KTOTrainer._compute_loss(trainer, lambda **inputs: outputs, inputs, False)


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl", [[0.4, 1.3, -0.2, 0.1, 0.9, 0.0], [-3.0, 0.1, -0.2, 0.1, 0.3, 0.0]])
def test_kto_agrees_with_trl_for_the_same_reference_point(kind, kl):
    weights = {"beta": 0.3, "desirable": 1.5, "undesirable": 0.7}
    objective = KTO(**weights, reference_point=kind == "kto")
    crossed = torch.tensor(kl, dtype=torch.float64)
    own = losses(objective, LABELS, mismatched=crossed.mean().expand(6)).mean()
    theirs = trl_kto(SPEECH.logps(POLICY), SPEECH.logps(REFERENCE).detach(), LABELS, kind, crossed, **weights)
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(each, POLICY)[0] for each in (own, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
    assert gradients[0].abs().max() > 1e-3


def test_kto_is_lambda_less_the_value_and_saturates_on_both_sides():
    objective = KTO(beta=2.0, desirable=3.0, undesirable=0.5)
    batch = batch_of(SPEECH, POLICY, ALL, offline(objective, LABELS), reference=REFERENCE)
    gained = (batch.logps - batch.ref_logps).sum(-1)
    batch = replace(
        batch, mismatched=gained.detach()
    )  # each response is its own reference point, where that is above 0
    expected = torch.where(LABELS == 1, 1.5, 0.25).double()
    above = gained > 0
    torch.testing.assert_close(objective.loss(batch, ONE)[above], expected[above], **EXACT)
    far = replace(batch, mismatched=batch.mismatched * 0 + 1e3)
    limit = torch.where(LABELS == 1, 3.0, 0.0).double()
    torch.testing.assert_close(objective.loss(far, ONE), limit, **EXACT)


def test_kto_takes_a_negative_estimate_of_the_divergence_for_none():
    below, at = (losses(KTO(), LABELS, mismatched=torch.full((6,), each).double()) for each in (-2.0, 0.0))
    assert torch.equal(below, at) and torch.equal(at, losses(KTO(reference_point=False), LABELS))
    above = losses(KTO(), LABELS, mismatched=torch.full((6,), 2.0).double())
    assert ((above > at) == (LABELS == 1)).all()


def test_desirable_is_what_is_above_the_threshold():
    signal = torch.tensor([0.5, 0.51, -1.0, 3.0], dtype=torch.float64)
    for threshold, expected in ((0.5, [-1, 1, -1, 1]), (0.0, [1, 1, -1, 1]), ("mean", [-1, -1, -1, 1])):
        assert offline(KTO(threshold=threshold), signal).tolist() == expected
    assert offline(KTO(desirable=4 / 3, undesirable=0), signal).tolist() == [0, 4 / 3, 0, 4 / 3]


# --- filtered and unlikelihood --------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
def test_filtered_is_supervised_fine_tuning_on_what_is_above(average):
    torch.testing.assert_close(losses(Filtered(average=average), LABELS), LABELS * likelihood(average=average), **EXACT)
    every = losses(Filtered(average=average, threshold=-1e9), REWARDS)
    torch.testing.assert_close(every, likelihood(average=average), **EXACT)


def test_unlikelihood_by_hand_and_without_bad_responses():
    logps, mask = SPEECH.logps(POLICY), SPEECH.mask
    avoided = -((1 - logps.exp()).log() * mask).sum(-1)
    expected = torch.where(LABELS == 1, -logps.sum(-1), 0.4 * avoided)
    torch.testing.assert_close(losses(Unlikelihood(alpha=0.4, average=False), LABELS), expected, **EXACT)
    averaged = losses(Unlikelihood(alpha=0.4), LABELS)
    torch.testing.assert_close(averaged, expected / mask.sum(-1), **EXACT)
    torch.testing.assert_close(losses(Unlikelihood(), LABELS * 0 + 1), likelihood(), **EXACT)
    torch.testing.assert_close(losses(Unlikelihood(alpha=0), LABELS), losses(Filtered(), LABELS), **EXACT)


def test_unlikelihood_of_a_sure_token_is_finite_and_leaves_it():
    """The slope in log p is p / (1 - p), until 1 - p is below its bound."""
    sure = torch.tensor([-1e-3, -1e-5, -1e-8, 0.0], dtype=torch.float64)
    batch = batch_of(DIE, DIE.parameters(0), torch.arange(4), -torch.ones(4).double())
    batch = replace(batch, logps=sure[:, None].clone().requires_grad_())
    found = Unlikelihood().loss(batch, plain_terms(4))
    assert found[2:].tolist() == pytest.approx([-log(LEAST)] * 2)
    (gradient,) = torch.autograd.grad(found.sum(), batch.logps)
    expected = [exp(each) / -torch.tensor(each).double().expm1().item() for each in (-1e-3, -1e-5)]
    assert gradient.flatten().tolist() == pytest.approx([*expected, 0, 0])


# --- weighted likelihood --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_reward_weighted_is_smallest_at_the_optimum_where_the_reference_wrote_the_data(beta):
    """And moves nowhere else: gradient descent from the reference comes to pi_ref exp(R / beta) / Z."""
    objective = RewardWeighted(beta=beta, average=False)
    written = SPEECH.logps(REFERENCE.detach()).sum(-1)
    optimum = (written + REWARDS / beta).log_softmax(-1)
    value = lambda policy: (written.exp() * losses(objective, REWARDS, policy)).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(value(there := SPEECH.fitted(optimum)), there)
    assert gradient.abs().max() < 1e-12
    reached = SPEECH.logps(minimised(SPEECH, REFERENCE, value)).sum(-1)
    torch.testing.assert_close(reached, optimum, rtol=0, atol=1e-5)


def test_no_value_is_subtracted_from_the_reward():
    """The trap of the published configuration: the weight of a reward of 0 is 1, whatever else the batch has."""
    weights = offline(RewardWeighted(beta=2.0), torch.tensor([0.0, 2.0, -4.0], dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([1.0, exp(1), exp(-2)], dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("make", [RewardWeighted, AdvantageWeighted])
@pytest.mark.parametrize("average", [True, False])
def test_as_beta_grows_it_is_likelihood(make, average):
    found = losses(make(beta=1e9, average=average), REWARDS)
    torch.testing.assert_close(found, likelihood(average=average), rtol=0, atol=1e-7)  # 3.4 / 1e9 times a few nats
    assert (losses(make(beta=1.0), REWARDS) - likelihood()).abs().max() > 0.1


def test_a_weight_that_no_float_holds_is_refused():
    with pytest.raises(PluginError, match=r"a reward of 9 has the weight exp\(90\).*raise beta"):
        offline(RewardWeighted(beta=0.1), torch.tensor([9.0, -1e4], dtype=torch.float64))
    assert offline(RewardWeighted(beta=0.1), torch.tensor([-1e4], dtype=torch.float64)).tolist() == [0]


def test_advantage_weighted_is_reward_weighted_less_the_mean_of_the_prompt():
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    own = offline(AdvantageWeighted(beta=0.7), REWARDS, groups)
    means = torch.tensor([REWARDS[groups == g].mean() for g in groups])
    torch.testing.assert_close(own, ((REWARDS - means) / 0.7).exp(), **EXACT)
    assert own[5] == 1
    shifted = offline(AdvantageWeighted(beta=0.7), REWARDS + 10.0 * groups, groups)
    torch.testing.assert_close(shifted, own, **EXACT)


def test_an_advantage_counts_a_thousand_at_most():
    wide = torch.tensor([0.0, 30.0], dtype=torch.float64)
    assert offline(AdvantageWeighted(), wide).tolist() == pytest.approx([exp(-15), 1000.0])
    assert offline(AdvantageWeighted(largest=5), wide)[1].item() == pytest.approx(5)


def test_a_learned_value_gives_each_token_a_weight_and_learns_the_reward():
    objective = AdvantageWeighted(learned=True, beta=0.5, policy=0.25, average=False)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((*SPEECH.mask.shape, 3), generator=generator, dtype=torch.float64) * SPEECH.mask[..., None]
    own = {name: value.double() + 0.3 for name, value in objective.parameters(3, generator).items()}
    own = {name: value.requires_grad_() for name, value in own.items()}
    values = (hidden @ own["value.weight"] + own["value.bias"]).detach()
    found = losses(objective, REWARDS, hidden=hidden, parameters=own)
    weights = ((REWARDS[:, None] - values) / 0.5).exp().clamp(max=1000)
    policy = (weights * SPEECH.logps(POLICY)).sum(-1)
    error = ((REWARDS[:, None] - values) ** 2 * SPEECH.mask).sum(-1) / SPEECH.mask.sum(-1)
    torch.testing.assert_close(found, -0.25 * policy + 0.75 * error, **EXACT)
    (slope,) = torch.autograd.grad(found.sum(), own["value.bias"])
    expected = 0.75 * (2 * (values - REWARDS[:, None]) * SPEECH.mask).sum(-1) / SPEECH.mask.sum(-1)
    torch.testing.assert_close(slope, expected.sum(0, keepdim=True), **EXACT)


# --- all of them ----------------------------------------------------------------------------------------------------

ROUND = "other_prompts_leave_advantages_alone"  # a threshold at the mean of the round


@pytest.mark.parametrize(
    ("objective", "exempt"),
    [
        (KTO(threshold="mean"), [ROUND]),
        (Filtered(threshold="mean", average=False), [ROUND]),
        (Unlikelihood(threshold="mean", average=False), [ROUND]),
        (AdvantageWeighted(learned=True), ["gradient_is_the_derivative"]),  # of a weight held fixed
    ],
    ids=lambda each: type(each).__name__,
)
def test_they_conform(objective, exempt):
    check_objective(objective, exempt=exempt)

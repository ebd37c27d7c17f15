"""GRPO and GSPO equal TRL's own loss code on the same log-probabilities, advantages included."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from moalign.api import Batch
from moalign_plugins.objectives.grpo import GRPO
from moalign_plugins.objectives.gspo import GSPO
from moalign_plugins.objectives.rloo import RLOO

PROMPTS, SIZE, TOKENS = 4, 5, 7
ROWS = PROMPTS * SIZE
GROUPS = torch.arange(ROWS) // SIZE


def log_probabilities(dtype, drift=0.3):
    """Policy, sampler, reference and mask; the policy has moved from the sampler, so that some tokens are clipped."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(1, TOKENS + 1, (ROWS, 1), generator=generator)
    mask = (torch.arange(TOKENS) < ends).to(dtype)
    old = -3 * torch.rand(ROWS, TOKENS, generator=generator, dtype=torch.float64)
    policy, reference = (old + drift * torch.randn(2, ROWS, TOKENS, generator=generator, dtype=torch.float64)).to(dtype)
    return (policy * mask).requires_grad_(), old.to(dtype) * mask, reference * mask, mask


def trl_advantages(rewards, scale):
    """TRL's ``sum_then_normalize`` of one reward, with its own deviation."""
    mean = rewards.view(-1, SIZE).mean(1).repeat_interleave(SIZE)
    deviation = nanstd(rewards.view(-1, SIZE), dim=1).repeat_interleave(SIZE)
    return (rewards - mean) / (deviation + 1e-4) if scale else rewards - mean


def trl_loss(objective, logps, old, reference, mask, advantages, loss_type="grpo"):
    """``GRPOTrainer._compute_loss`` on a stand-in for the trainer, with a model that returns ``logps``."""
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=objective.kl == "k3"),
        current_gradient_accumulation_steps=1,
        importance_sampling_level="sequence" if isinstance(objective, GSPO) else "token",
        loss_type=loss_type,
        beta=objective.beta,
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
        max_completion_length=TOKENS,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1),
        "prompt_mask": torch.ones(ROWS, 1),
        "completion_ids": torch.zeros(ROWS, TOKENS),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def own_loss(objective, logps, old, reference, mask, rewards):
    """The mean that the engine takes, with advantages in its double precision."""
    rows, ones = torch.arange(ROWS), torch.ones(ROWS, dtype=logps.dtype)
    batch = Batch(
        logps=logps,
        mask=mask,
        pairs=torch.stack([rows, rows], 1),
        pair_objective=torch.full((ROWS,), -1),
        preference=ones[:, None],
        strength=ones,
        groups=GROUPS,
        ref_logps=reference,
        advantages=objective.advantages(rewards, GROUPS, (old - reference).double().sum(-1)).to(logps.dtype),
        old_logps=old,
    )
    return objective.loss(batch, None).mean()


def assert_agrees(objective, dtype, loss_type="grpo", scale=True):
    logps, old, reference, mask = log_probabilities(dtype)
    rewards = torch.randn(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = own_loss(objective, logps, old, reference, mask, rewards)
    advantages = trl_advantages(rewards, scale).to(dtype)
    theirs = trl_loss(objective, logps, old, reference, mask, advantages, loss_type)
    (our_gradient,) = torch.autograd.grad(ours, logps, retain_graph=True)
    (their_gradient,) = torch.autograd.grad(theirs, logps)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=tolerance, atol=tolerance)
    assert their_gradient.abs().max() > 1e-3
    assert (their_gradient[mask > 0] == 0).any() or objective.beta > 0  # some tokens are clipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kl", ["k3", "forward"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo(dtype, kl, beta):
    assert_agrees(GRPO(beta=beta, kl=kl), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bounds_of_dapo(dtype):
    assert_agrees(GRPO(beta=0.0, epsilon_high=0.28), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dr_grpo(dtype):
    """Neither a deviation nor the response's own length."""
    objective = GRPO(beta=0.1, standardise=False, length=TOKENS)
    assert_agrees(objective, dtype, loss_type="dr_grpo", scale=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gspo(dtype, beta):
    """With the forward KL, as in its KL the other one has the ratio of the sequence in TRL, and ours the token's."""
    assert_agrees(GSPO(beta=beta, kl="forward", epsilon_low=0.05, epsilon_high=0.05), dtype)


def test_rloo_is_grpo_without_deviation_times_g_over_g_minus_one():
    """And the sum over tokens in place of a mean: TRL's ``dr_grpo`` times the length that it divides by."""
    logps, old, reference, mask = log_probabilities(torch.float64)
    rewards = torch.randn(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective = RLOO(beta=0.0, epsilon_low=0.2, epsilon_high=0.2)
    ours = own_loss(objective, logps, old, reference, mask, rewards)
    theirs = trl_loss(objective, logps, old, reference, mask, trl_advantages(rewards, scale=False), "dr_grpo")
    torch.testing.assert_close(ours, theirs * TOKENS * SIZE / (SIZE - 1), rtol=1e-12, atol=1e-12)

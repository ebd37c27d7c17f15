"""Losses and gradients equal those of TRL's own loss code on the same log-probabilities."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer

from moalign.api import Batch
from moalign_plugins.combiners.linear import Linear
from moalign_plugins.objectives.dpo import DPO
from moalign_plugins.objectives.ipo import IPO
from moalign_plugins.objectives.sft import SFT

PAIRS, TOKENS = 4, 7


def log_probabilities(dtype):
    """[chosen; rejected] responses of different lengths behind prompts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(1, 3, (2 * PAIRS, 1), generator=generator)
    ends = torch.randint(4, TOKENS + 1, (2 * PAIRS, 1), generator=generator)
    positions = torch.arange(TOKENS)
    mask = ((positions >= starts) & (positions < ends)).to(dtype)
    policy, reference = -3 * torch.rand(2, 2 * PAIRS, TOKENS, generator=generator, dtype=dtype) * mask
    return policy.requires_grad_(), reference, mask


def trl_loss(logps, reference, mask, *, loss_types, loss_weights=(1.0,), beta=0.1, **settings):
    """``DPOTrainer._compute_loss`` on a stand-in for the trainer, with a model that returns ``logps``.

    ``settings``: attributes of the trainer that are to be otherwise, such as ``label_smoothing``.
    """
    shifted = torch.zeros_like(logps)
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    attributes = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "args": SimpleNamespace(),
        "loss_types": list(loss_types),
        "loss_weights": list(loss_weights),
        "beta": beta,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "precompute_ref_logps": True,
        "aux_loss_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    trainer = SimpleNamespace(**attributes | settings)
    first = torch.zeros(len(mask), 1, dtype=mask.dtype)  # TRL's masks have the token that nothing predicts
    completion_mask = torch.cat([first, mask], 1).long()
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }

    def model(**_):
        # where the label is -100, a model returns 0 without a gradient
        return SimpleNamespace(log_probs=logps * mask, entropy=shifted, mean_logits=shifted, is_top1=shifted.bool())

    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


def own_loss(loss, logps, reference, mask):
    rows = torch.arange(PAIRS)
    batch = Batch(
        logps=logps,
        mask=mask,
        pairs=torch.stack([rows, rows + PAIRS], 1),
        pair_objective=torch.full((PAIRS,), -1),
        preference=torch.ones(2 * PAIRS, 1, dtype=logps.dtype),
        strength=torch.ones(PAIRS),
        groups=torch.cat([rows, rows]),
        ref_logps=reference,
    )
    return loss.loss(batch, Linear().pair_terms(batch))


def assert_equal(ours, theirs, logps):
    (our_gradient,) = torch.autograd.grad(ours, logps, retain_graph=True)
    (their_gradient,) = torch.autograd.grad(theirs, logps)
    tolerance = 1e-12 if logps.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=tolerance, atol=tolerance)
    assert their_gradient.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [0.1, 1.3])
def test_dpo(dtype, beta):
    logps, reference, mask = log_probabilities(dtype)
    ours = own_loss(DPO(beta=beta), logps, reference, mask).mean()
    assert_equal(ours, trl_loss(logps, reference, mask, loss_types=["sigmoid"], beta=beta), logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [0.1, 1.3])
def test_ipo_averages_in_trl(dtype, beta):
    logps, reference, mask = log_probabilities(dtype)
    ours = own_loss(IPO(beta=beta, average=True), logps, reference, mask).mean()
    assert_equal(ours, trl_loss(logps, reference, mask, loss_types=["ipo"], beta=beta), logps)


def test_sft_weights_long_responses_more_in_trl():
    """TRL's mean runs over all tokens of the batch: our sums over the number of tokens."""
    logps, reference, mask = log_probabilities(torch.float64)
    ours = own_loss(SFT(average=False), logps, reference, mask).sum() / mask[:PAIRS].sum()
    assert_equal(ours, trl_loss(logps, reference, mask, loss_types=["sft"]), logps)


def test_dpo_and_sft_together():
    logps, reference, mask = log_probabilities(torch.float64)
    dpo = own_loss(DPO(), logps, reference, mask).mean()
    sft = own_loss(SFT(average=False), logps, reference, mask).sum() / mask[:PAIRS].sum()
    theirs = trl_loss(logps, reference, mask, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.3])
    assert_equal(dpo + 0.3 * sft, theirs, logps)

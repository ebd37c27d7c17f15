"""How far the fused core is from float64 truth, and what its options do to the gradient."""

from __future__ import annotations

import math

import pytest
import torch

from moalign.ops import token_logps


def language_model_like(dtype, *, n=96, d=64, v=6000, seed=0):
    """Logits of a trained model's size: a third of the labels are nearly certain, a third likely, a third hopeless.

    Returned in ``dtype``; the truth is that of the rounded inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(v, d, generator=generator, dtype=torch.float64)
    labels = torch.randint(v, (n,), generator=generator)
    hidden = 0.2 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    push = torch.tensor([22.0, 8.0, -8.0]).double().repeat(n // 3)
    hidden += push[:, None] * head[labels] / head[labels].square().sum(-1, keepdim=True)
    return hidden.to(dtype), head.to(dtype), labels


def value_and_units(hidden, head, labels, **options):
    """logps [N] and u [N,D]: rows do not share a derivative, so the gradient of the sum holds all of them."""
    leaf = hidden.detach().clone().requires_grad_()
    logps = token_logps(leaf, head, labels, **options).logps
    (units,) = torch.autograd.grad(logps.sum(), leaf)
    return logps.detach().double(), units.double()


def test_float32_log_probabilities_are_within_1e5():
    hidden, head, labels = language_model_like(torch.float32)
    truth, true_units = value_and_units(hidden.double(), head.double(), labels, implementation="reference")
    logps, units = value_and_units(hidden, head, labels, implementation="chunked")
    assert truth.max() > math.log(0.999) and truth.min() < -15
    assert (logps - truth).abs().max() < 1e-5
    certain = truth > math.log(0.999)
    assert certain.sum() > 10
    # 1 - p is known as well as the logits are: their rounding, about 22 * 2^-24 * a few, carries over
    assert (logps / truth - 1)[certain].abs().max() < 1e-4
    assert ((units - true_units).norm(dim=1) / true_units.norm(dim=1)).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_log_probabilities_are_within_1e3_and_u_within_half_a_percent(dtype):
    """Also where p > 0.999, where rounded logits would be wrong by 0.06 and a rounded p by all of 1 - p."""
    hidden, head, labels = language_model_like(dtype)
    truth, true_units = value_and_units(hidden.double(), head.double(), labels, implementation="reference")
    logps, units = value_and_units(hidden, head, labels, implementation="chunked")
    rounded, _ = value_and_units(hidden, head, labels, implementation="reference")
    certain = truth > math.log(0.999)
    assert certain.sum() > 10
    assert (logps - truth).abs().max() < 1e-3 < (rounded - truth).abs().max()
    errors = (units - true_units).norm(dim=1) / true_units.norm(dim=1)
    assert errors.max() < 5e-3 and errors[certain].max() < 5e-3


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_the_gradient_of_the_entropy(softcap, temperature, trainable, implementation):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 3, generator=generator, dtype=torch.float64, requires_grad=trainable)
    bias = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=trainable)
    labels = torch.tensor([0, 10, -100, 4, 4])

    def both(hidden, head, bias):
        options = {"temperature": temperature, "softcap": softcap, "entropy_gradient": True, "chunk_tokens": 2}
        return token_logps(hidden, head, labels, bias, implementation=implementation, **options)

    assert torch.autograd.gradcheck(both, (hidden, head, bias))
    entropy = both(hidden, head, bias).entropy
    assert entropy[2] == 0 and entropy.requires_grad


@pytest.mark.parametrize("negligible", [2.0**-12, 1e-2, 0.3])
def test_leaving_out_what_is_negligible_errs_by_no_more_than_stated(negligible):
    hidden, head, labels = language_model_like(torch.float64)
    exact, units = value_and_units(hidden, head, labels, implementation="chunked")
    options = {"implementation": "chunked", "negligible": negligible, "chunk_tokens": 8}
    values, shortened = value_and_units(hidden, head, labels, **options)
    assert torch.equal(values, exact)
    probabilities = (hidden @ head.t()).softmax(-1)
    largest = probabilities.scatter(1, labels[:, None], 1.0).view(-1, 8, len(head)).amax(1).repeat_interleave(8, 0)
    bound = (probabilities * (largest < negligible)).sum(-1) * head.norm(dim=1).max()
    error = (shortened - units).norm(dim=1)
    assert (error <= bound * (1 + 1e-9) + 1e-12).all()
    assert error.max() > 0  # something was left out

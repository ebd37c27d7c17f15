"""FrozenLinear is nn.Linear, whatever the shape, and hands no gradient to what is frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moalign.ops import products
from moalign.ops.frozen_linear import FrozenLinear, speed_up

onednn = pytest.mark.skipif(
    not products.uses_onednn(torch.zeros(1)), reason="this build of torch has no oneDNN product"
)


def layer(bias=True, inputs=64, outputs=96, dtype=torch.float32):
    torch.manual_seed(0)
    made = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    speed_up(made)
    assert type(made) is FrozenLinear
    return made


def exact(made, x, upstream):
    leaf = x.detach().double().requires_grad_()
    bias = None if made.bias is None else made.bias.double()
    y = nn.functional.linear(leaf, made.weight.double(), bias)
    return y.detach(), torch.autograd.grad(y, leaf, upstream.double())[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (300, 64), (3, 111, 64), (2, 3, 50, 64), (0, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_a_linear_layer(bias, shape, dtype):
    made, x = layer(bias, dtype=dtype), torch.randn(*shape).to(dtype).requires_grad_()
    y = made(x)
    upstream = torch.randn(y.shape).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert y.shape == (*shape[:-1], 96) and gradient.shape == x.shape and gradient.dtype == y.dtype == dtype
    # sums of 64 and 96 terms of size 1: sqrt(96) roundings, and bfloat16 rounds the result
    tolerance = 16 * torch.finfo(torch.float32).eps if dtype != torch.bfloat16 else 2**-7
    for value, expected in zip((y, gradient), exact(made, x, upstream), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=2 * tolerance)


def test_strides_do_not_matter():
    made, x = layer(), torch.randn(64, 500).t().requires_grad_()
    upstream = torch.randn(96, 500).t()
    y = made(x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    for value, expected in zip((y, gradient), exact(made, x, upstream), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@onednn
def test_the_fast_product_is_used_from_a_size_on(monkeypatch):
    calls = []
    product = products.onednn_linear
    monkeypatch.setattr(products, "onednn_linear", lambda *tensors: calls.append(1) or product(*tensors))
    made = layer()
    made(torch.randn(8, 64))
    assert len(calls) == 0
    made(torch.randn(400, 64).requires_grad_()).sum().backward()
    assert len(calls) == 2


def test_a_layer_that_is_trained_gets_its_gradients():
    made = layer()
    made.weight.requires_grad_()
    made(torch.randn(400, 64)).sum().backward()
    assert made.weight.grad is not None


def test_only_plain_linear_layers_are_touched():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Special(2, 2), nn.LayerNorm(2))
    names = list(model.state_dict())
    speed_up(model)
    assert [type(module) for module in model] == [FrozenLinear, Special, nn.LayerNorm]
    assert list(model.state_dict()) == names

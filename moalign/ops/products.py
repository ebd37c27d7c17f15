"""The matrix products around the row pass, each in the fastest way that loses no precision.

Logits are needed in float32 whatever the dtype of the weights: rounded to bfloat16 they are wrong by up to 2.5e-2. No
copy of the whole head is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moalign.ops.contract import result_dtype

MIN_MULTIPLICATIONS = 2**20  # of a product; below them calling oneDNN costs more than it saves
BLOCK_ELEMENTS = 2**22  # entries of a half-precision head that are in float32 at a time: 16 MiB


def logits(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """hidden[n,D] @ weight[V,D].T as [n,V], float32 (float64 for float64); in ``out``, except where oneDNN is used."""
    if uses_onednn(weight):
        return onednn_linear(hidden, weight)
    if out is None:
        out = hidden.new_empty(len(hidden), len(weight), dtype=result_dtype(weight.dtype))
    if out.dtype == weight.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    if weight.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    hidden = hidden.to(out.dtype)
    for block in _vocabulary_blocks(weight):
        out[:, block] = hidden @ weight[block].to(out.dtype).t()
    return out


def rounds_gradient(weight: Tensor) -> bool:
    """Whether ``times_head`` takes the gradient in the weights' dtype, else in that of the logits."""
    if weight.is_cuda or weight.dtype == torch.float64:
        return True
    brain = _ONEDNN and weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return brain and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def times_head(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient[n,V] @ weight[V,D] as [n,D], in the dtype of ``gradient``, accumulated in float32 or better."""
    if uses_onednn(weight):
        return onednn_linear(gradient, weight.t())
    if gradient.dtype == weight.dtype:
        return gradient @ weight
    total = gradient.new_zeros(len(gradient), weight.shape[1])
    for block in _vocabulary_blocks(weight):
        total.addmm_(gradient[:, block], weight[block].to(gradient.dtype))
    return total


def add_outer(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total[V,D] += gradient[n,V].T @ hidden[n,D], without rounding the summand to a half-precision dtype first."""
    if gradient.is_cuda and gradient.dtype != total.dtype:
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(gradient.t().to(total.dtype), hidden.to(total.dtype))


def uses_onednn(weight: Tensor) -> bool:
    """float32 on a CPU: oneDNN's product needs about half the time of torch.mm there, and writes only to new memory."""
    return _ONEDNN and weight.device.type == "cpu" and weight.dtype == torch.float32


def gains_from_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether x[...,D] @ weight[m,D].T is large enough to be worth the call."""
    return uses_onednn(weight) and x.dtype == weight.dtype and x.numel() * len(weight) >= MIN_MULTIPLICATIONS


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows[n,D] @ weight[m,D].T + bias[m], whatever the size, without autograd where oneDNN is used."""
    if gains_from_onednn(rows, weight):
        return onednn_linear(rows.contiguous(), weight, bias)
    return torch.nn.functional.linear(rows, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[n,D] @ weight[m,D].T + bias[m], float32 on a CPU, without autograd."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_works() -> bool:
    """The operator is torch.compile's, without a promise to users: it is tried once on a case that is known."""
    try:
        x = torch.tensor([[1.0, 2.0]])
        return onednn_linear(x, torch.tensor([[3.0, 4.0], [0.0, -1.0]])).tolist() == [[11.0, -2.0]]
    except (AttributeError, RuntimeError, TypeError):
        return False


def _vocabulary_blocks(weight: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // weight.shape[1])
    return (slice(start, start + size) for start in range(0, len(weight), size))


_ONEDNN = _onednn_works()

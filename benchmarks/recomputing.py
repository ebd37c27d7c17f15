"""What moalign would be without unit gradients: the operation with logits computed again in the backward pass.

Three GEMMs per token and gradient, two more per further gradient. Chunks, buffers and passes over the logits are as
good as we know how to make them, so that the comparison is about the GEMM and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from benchmarks import products

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}  # of float32 logits


def token_logps(hidden: Tensor, lm_head: Tensor, labels: Tensor) -> Tensor:
    """log softmax(hidden[N,D] @ lm_head[V,D].T)[labels[N]], float32 [N]; gradients to ``hidden`` and ``lm_head``."""
    return _Recomputing.apply(hidden, lm_head, labels)


def chunk_tokens(lm_head: Tensor) -> int:
    return max(1, CHUNK_BYTES[lm_head.device.type] // (4 * len(lm_head)))


class _Chunks:
    """Logits of a few tokens at a time, in buffers that all chunks share."""

    def __init__(self, hidden: Tensor, lm_head: Tensor):
        self.hidden, self.lm_head = hidden, lm_head
        self.size = min(chunk_tokens(lm_head), len(hidden))
        self.whole = hidden.dtype in (torch.float32, torch.float64)  # no second buffer of another dtype
        self.fresh = hidden.is_cuda or products.onednn(lm_head)  # products go to new memory, which the allocator reuses
        self.product = None if self.fresh else lm_head.new_empty(self.size, len(lm_head))
        self.logits = None if self.whole or self.fresh else lm_head.new_empty(self.size, len(lm_head)).float()

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.hidden), self.size):
            part = slice(start, min(start + self.size, len(self.hidden)))
            yield part, self._compute(self.hidden[part])

    def _compute(self, hidden: Tensor) -> Tensor:
        if self.product is None:
            if self.whole:
                return products.linear(hidden, self.lm_head)
            return torch.mm(hidden, self.lm_head.t(), out_dtype=torch.float32)
        product = torch.mm(hidden, self.lm_head.t(), out=self.product[: len(hidden)])
        return product if self.logits is None else self.logits[: len(hidden)].copy_(product)

    def rounded(self, values: Tensor) -> Tensor:
        """In the dtype of the weights, for the next GEMM."""
        if self.whole:
            return values
        return values.to(self.lm_head.dtype) if self.product is None else self.product[: len(values)].copy_(values)


class _Recomputing(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lm_head: Tensor, labels: Tensor) -> Tensor:
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        select = _row_pass("select", hidden.device.type)
        for part, logits in _Chunks(hidden, lm_head):
            logps[part] = select(logits, labels[part])
        ctx.save_for_backward(hidden, lm_head, labels, logps)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, lm_head, labels, logps = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(lm_head, dtype=torch.float32) if wants_weight else None
        gradient = _row_pass("gradient", hidden.device.type)
        chunks = _Chunks(hidden, lm_head)
        for part, logits in chunks:
            scale = -upstream[part, None]
            # rows of [n,D] are cheaper to scale than rows of [n,V], which only dW needs scaled
            unit = gradient(logits, labels[part], logps[part], scale if d_weight is not None else None)
            unit = chunks.rounded(unit)
            if d_hidden is not None:
                product = products.linear(unit, lm_head.t())
                d_hidden[part] = product if d_weight is not None else product.mul_(scale)
            if d_weight is not None:
                _add_product(d_weight, unit.t(), hidden[part])
        return d_hidden, None if d_weight is None else d_weight.to(lm_head.dtype), None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in float32."""
    if a.dtype == torch.float32:
        total.add_(products.linear(a, b.t()))
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        total.add_(a @ b)


@cache
def _row_pass(name: str, device_type: str) -> Callable[..., Tensor]:
    """In place in torch on a CPU; on a GPU the compiler fuses the pass into one kernel."""
    passes: dict[str, Callable[..., Tensor]] = {"select": _select, "gradient": _gradient}
    function = passes[name]
    return torch.compile(function, dynamic=True) if device_type == "cuda" else function


def _select(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.is_cuda:
        return logits.gather(1, labels[:, None]).squeeze(1) - logits.logsumexp(-1)
    return torch.log_softmax(logits, -1, out=logits).gather(1, labels[:, None]).squeeze(1)


def _gradient(logits: Tensor, labels: Tensor, logps: Tensor, scale: Tensor | None) -> Tensor:
    """scale * (softmax(logits) - onehot); at the label expm1(logp), because p - 1 would cancel."""
    if logits.is_cuda:
        label = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
        unit = torch.where(label, torch.expm1(logps)[:, None], torch.softmax(logits, -1))
        return unit if scale is None else unit * scale
    unit = torch.softmax(logits, -1, out=logits).scatter_(1, labels[:, None], torch.expm1(logps)[:, None])
    return unit if scale is None else unit.mul_(scale)

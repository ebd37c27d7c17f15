"""Token log-probabilities without the [N,V] logits: a few tokens at a time, the whole vocabulary in each GEMM.

Whatever the loss, its gradient reaches the hidden state x of a token with label y only through

    d logp / d x  =  u  =  (onehot(y) - softmax(x W^T)) W        (over the temperature, times the softcap's slope)

which is known as soon as the logits are. So where the head is frozen, as under LoRA, the forward pass turns the logits
of a chunk in place into u and forgets them: two GEMMs in all, and the backward pass only scales rows of u[N,D].
A trainable head needs the upstream gradient before it can sum over tokens, so that path computes the logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moalign.ops.contract import TokenLogps, result_dtype

CHUNK_ELEMENTS = 2**26  # logits at a time: 256 MiB in float32; a chunk of 512 tokens for a vocabulary of 128k


def token_logps(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    chunk_tokens: int | None = None,
) -> TokenLogps:
    """Equal to ``reference.token_logps``; the result does not depend on ``chunk_tokens`` beyond rounding."""
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // len(lm_head))
    head = _Head(lm_head, bias, temperature, softcap)
    trainable = lm_head.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and trainable:
        return TokenLogps(*_Recompute.apply(hidden, lm_head, bias, labels, head, entropy, chunk))
    if torch.is_grad_enabled() and hidden.requires_grad:
        return TokenLogps(*_UnitGradient.apply(hidden, labels, head, entropy, chunk))
    with torch.no_grad():
        return _forward(hidden, labels, head, entropy, chunk, unit=None)


@dataclass(frozen=True)
class _Head:
    """From a hidden state to the logits of the softmax."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None


class _Logits:
    """The logits of one chunk, in buffers that all chunks of a call share.

    ``values`` is float32 (float64 for float64), ``product`` has the dtype of the weights: the GEMM writes it, and what
    goes into the next GEMM is rounded into it once. For float32 and float64 both are one buffer.
    """

    def __init__(self, head: _Head, tokens: int):
        self.head = head
        self.product = head.weight.new_empty(tokens, len(head.weight))
        dtype = result_dtype(self.product.dtype)
        self.values = self.product if dtype == self.product.dtype else torch.empty_like(self.product, dtype=dtype)
        self.slope = None if head.softcap is None else torch.empty_like(self.values)

    def compute(self, hidden: Tensor) -> Tensor:
        """``values`` [n,V] becomes the logits of ``hidden`` [n,D] as the softmax sees them."""
        head, n = self.head, len(hidden)
        values, product = self.values[:n], self.product[:n]
        torch.mm(hidden, head.weight.t(), out=product)
        if self.values is not self.product:
            values.copy_(product)
        if head.bias is not None:
            values.add_(head.bias)
        if self.slope is not None and head.softcap is not None:
            values.div_(head.softcap).tanh_()
            torch.mul(values, values, out=self.slope[:n]).neg_().add_(1)
            values.mul_(head.softcap)
        return values.div_(head.temperature)

    def gradient(
        self, values: Tensor, labels: Tensor, logps: Tensor, total: Tensor, upstream: Tensor | None = None
    ) -> Tensor:
        """From what ``_normalise`` left, in place: upstream * d logp / d (hidden @ weight.T) in the weights' dtype.

        The label's entry is 1 - p = -expm1(logp): the difference would cancel for tokens the model is sure of.
        """
        scale = -1 / self.head.temperature
        factor = torch.full_like(total, scale) if upstream is None else upstream * scale
        values.mul_((factor / total)[:, None])
        values.scatter_(1, labels[:, None], (factor * torch.expm1(logps))[:, None])
        if self.slope is not None:
            values.mul_(self.slope[: len(values)])
        return values if self.values is self.product else self.product[: len(values)].copy_(values)


def _normalise(values: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """logp [n], the softmax's denominator [n] and the entropy [n] of logits [n,V].

    ``values`` becomes exp(logit - largest logit), with 0 at the label: from the sum of all others, logp and 1 - p have
    full relative precision even where p is nearly 1.
    """
    values.sub_(values.amax(-1, keepdim=True))
    label = values.gather(1, labels[:, None]).squeeze(1)
    values.exp_()
    spread = torch.special.entr(values).sum(-1) if entropy else None
    others = values.scatter_(1, labels[:, None], 0.0).sum(-1)
    logps = -torch.logaddexp(torch.zeros_like(label), others.log() - label)
    total = others + label.exp()
    return logps, total, None if spread is None else total.log() + spread / total


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _forward(hidden: Tensor, labels: Tensor, head: _Head, entropy: bool, chunk: int, unit: Tensor | None) -> TokenLogps:
    """Log-probabilities and entropies; fills ``unit`` [N,D] with d logp / d hidden where it is wanted."""
    dtype = result_dtype(hidden.dtype)
    logps = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    entropies = torch.empty_like(logps) if entropy else None
    logits = _Logits(head, min(chunk, len(hidden)))
    for part in _chunks(len(hidden), chunk):
        values = logits.compute(hidden[part])
        logps[part], total, spread = _normalise(values, labels[part], entropy)
        if entropies is not None and spread is not None:
            entropies[part] = spread
        if unit is not None:
            torch.mm(logits.gradient(values, labels[part], logps[part], total), head.weight, out=unit[part])
    return TokenLogps(logps, entropies)


class _UnitGradient(Function):
    """The head is frozen: the derivative of each log-probability is formed in the forward pass, and scaled later."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: _Head, entropy: bool, chunk: int
    ) -> tuple[Tensor, Tensor | None]:
        unit = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        logps, entropies = _forward(hidden, labels, head, entropy, chunk, unit)
        ctx.save_for_backward(unit)
        if entropies is not None:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return (grad[:, None] * unit).to(unit.dtype), None, None, None, None


class _Recompute(Function):
    """The head or its bias is trained: the logits are computed again when the upstream gradient is known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        head: _Head,
        entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor | None]:
        logps, entropies = _forward(hidden, labels, head, entropy, chunk, unit=None)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.temperature, ctx.softcap, ctx.chunk = head.temperature, head.softcap, chunk
        if entropies is not None:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        logits = _Logits(_Head(weight, bias, ctx.temperature, ctx.softcap), min(ctx.chunk, len(hidden)))
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = result_dtype(weight.dtype)  # of the sums over chunks
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if wants_bias else None
        for part in _chunks(len(hidden), ctx.chunk):
            values = logits.compute(hidden[part])
            logps, total = _normalise(values, labels[part], entropy=False)[:2]
            d_logits = logits.gradient(values, labels[part], logps, total, grad[part])
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight.add_(d_logits.t() @ hidden[part])
            if d_bias is not None:
                d_bias.add_(d_logits.sum(0, dtype=dtype))
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None, None, None, None),
        )

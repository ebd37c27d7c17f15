"""Token log-probabilities without the [N,V] logits: a few tokens at a time, the whole vocabulary in each product.

Whatever the loss, its gradient reaches the hidden state x of a token with label y only through

    d logp / d x  =  u  =  (onehot(y) - softmax(x W^T)) W        (over the temperature, times the softcap's slope)

which is known as soon as the logits are. So where the head is frozen, as under LoRA, the forward pass turns the logits
of a chunk into u and forgets them: two products in all, and the backward pass only scales rows of u[N,D], once for each
of M objectives' gradients. A trainable head needs the upstream gradient before it can sum over tokens, so that path
computes the logits again. The entropy's gradient is one more row u' per token, and one more product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moalign.ops import products, rows
from moalign.ops.contract import Options, RowPass, Rows, TokenLogps, result_dtype

CPU_BYTES = 24 * 2**20  # of logits at a time: they stay in the cache, and glibc keeps blocks of up to 32 MiB for reuse
MM_BYTES = 56 * 2**20  # torch.mm on a CPU wants more tokens at a time than oneDNN's product
DEVICE_BYTES = 448 * 2**20  # on an accelerator, logits and gradients together; tuning the kernel takes 128 MiB once
BACKWARD_ROWS = 4096  # of d hidden that are in float32 at a time


def token_logps(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: Options,
    row_pass: RowPass = rows.row_pass,
) -> TokenLogps:
    """Equal to ``reference.token_logps``; the result does not depend on ``chunk_tokens`` beyond rounding."""
    head = _Head(lm_head, bias, options, row_pass, options.chunk_tokens or default_chunk_tokens(lm_head, options))
    if torch.is_grad_enabled():
        if lm_head.requires_grad or (bias is not None and bias.requires_grad):
            return TokenLogps(*_Recompute.apply(hidden, lm_head, bias, labels, head))
        if hidden.requires_grad:
            return TokenLogps(*_UnitGradient.apply(hidden, labels, head))
    with torch.no_grad():
        return head.forward(hidden, labels)


def default_chunk_tokens(lm_head: Tensor, options: Options) -> int:
    """Tokens whose logits are in memory together: a stated number of bytes, whatever N is."""
    itemsize = result_dtype(lm_head.dtype).itemsize
    if lm_head.device.type == "cpu":
        budget = CPU_BYTES if products.uses_onednn(lm_head) else MM_BYTES
        return max(16, budget // (itemsize * len(lm_head)))
    buffers = 1 + (options.softcap is not None) + options.entropy
    tokens = DEVICE_BYTES // ((buffers * itemsize + lm_head.dtype.itemsize) * len(lm_head))
    return max(16, tokens // 128 * 128 or tokens)  # whole tiles of the matrix units


@dataclass(frozen=True)
class _Head:
    """From hidden states to log-probabilities, ``chunk`` tokens at a time."""

    weight: Tensor
    bias: Tensor | None
    options: Options
    row_pass: RowPass
    chunk: int

    def chunks(
        self,
        hidden: Tensor,
        labels: Tensor,
        dtype: torch.dtype | None,
        upstream: tuple[Tensor, Tensor | None] | None = None,
        entropy_gradient: bool = False,
    ) -> Iterator[tuple[slice, Rows]]:
        """The row pass over all tokens in order. ``upstream`` holds values per token of the whole."""
        buffer = None
        if not products.uses_onednn(self.weight):  # which brings its own memory
            size = min(self.chunk, len(hidden)), len(self.weight)
            buffer = hidden.new_empty(size, dtype=result_dtype(self.weight.dtype))
        for start in range(0, len(hidden), self.chunk):
            part = slice(start, min(start + self.chunk, len(hidden)))
            logits = products.logits(hidden[part], self.weight, None if buffer is None else buffer[: part.stop - start])
            mine = None
            if upstream is not None:
                mine = upstream[0][part], None if upstream[1] is None else upstream[1][part]
            wanted: Any = {"dtype": dtype, "upstream": mine, "entropy_gradient": entropy_gradient}
            yield part, self.row_pass(logits, labels[part], self.bias, self.options, **wanted)
            del logits  # before the next chunk's are made

    def forward(
        self, hidden: Tensor, labels: Tensor, unit: Tensor | None = None, entropy_unit: Tensor | None = None
    ) -> TokenLogps:
        """Values per token. Fills ``unit`` [N,D] with -temperature d logp / d hidden, ``entropy_unit`` likewise."""
        logps = torch.empty(len(hidden), dtype=result_dtype(hidden.dtype), device=hidden.device)
        entropies = torch.empty_like(logps) if self.options.entropy else None
        dtype = None if unit is None else self.gradient_dtype
        for part, found in self.chunks(hidden, labels, dtype, entropy_gradient=entropy_unit is not None):
            logps[part] = found.logps
            if entropies is not None and found.entropy is not None:
                entropies[part] = found.entropy
            if unit is not None and found.gradient is not None:
                unit[part] = self._times_weight(found.gradient, labels[part])
            if entropy_unit is not None and found.entropy_gradient is not None:
                entropy_unit[part] = products.times_head(found.entropy_gradient, self.weight)
            del found
        return TokenLogps(logps, entropies)

    @property
    def gradient_dtype(self) -> torch.dtype:
        return self.weight.dtype if products.rounds_gradient(self.weight) else result_dtype(self.weight.dtype)

    @property
    def scale(self) -> float:
        """Undoes what a row pass leaves to its caller."""
        return -1.0 / self.options.temperature

    def _times_weight(self, gradient: Tensor, labels: Tensor) -> Tensor:
        """gradient @ weight, without the tokens of the vocabulary that are negligible in the whole chunk."""
        if not self.options.negligible:
            return products.times_head(gradient, self.weight)
        kept = gradient.amax(0) >= self.options.negligible
        kept[labels] = True
        tokens = kept.nonzero().squeeze(1)
        return products.times_head(gradient.index_select(1, tokens), self.weight.index_select(0, tokens))


class _UnitGradient(Function):
    """The head is frozen: the derivative of each log-probability is formed in the forward pass, and scaled later."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: _Head) -> tuple[Tensor, Tensor | None]:
        unit = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        entropy_unit = torch.empty_like(unit) if head.options.entropy_gradient else None
        logps, entropies = head.forward(hidden, labels, unit, entropy_unit)
        ctx.save_for_backward(unit, entropy_unit)
        ctx.scale = head.scale
        if entropies is not None and entropy_unit is None:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        unit, entropy_unit = ctx.saved_tensors
        if entropy_unit is None and unit.dtype == grad.dtype:
            return (grad * ctx.scale)[:, None] * unit, None, None
        d_hidden = torch.empty_like(unit)
        for start in range(0, len(unit), BACKWARD_ROWS):  # float32 of a few rows, rounded once
            rows = slice(start, start + BACKWARD_ROWS)
            scaled = (grad[rows] * ctx.scale)[:, None] * unit[rows]
            if entropy_unit is not None and d_entropy[0] is not None:
                scaled.addcmul_((d_entropy[0][rows] * ctx.scale)[:, None], entropy_unit[rows])
            d_hidden[rows] = scaled
        return d_hidden, None, None


class _Recompute(Function):
    """The head or its bias is trained: the logits are computed again when the upstream gradient is known."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor | None]:
        logps, entropies = head.forward(hidden, labels)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.how = head.options, head.row_pass, head.chunk  # without the weight: saved tensors must not form a cycle
        if entropies is not None and not head.options.entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        head = _Head(weight, bias, *ctx.how)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        sums: Any = {"dtype": result_dtype(weight.dtype), "memory_format": torch.contiguous_format}  # over all chunks
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
        d_weight = torch.zeros_like(weight, **sums) if wants_weight else None
        d_bias = torch.zeros_like(bias, **sums) if wants_bias else None
        entropy_grad = d_entropy[0] if head.options.entropy_gradient else None
        upstream = grad * head.scale, None if entropy_grad is None else entropy_grad * head.scale
        for part, found in head.chunks(hidden, labels, head.gradient_dtype, upstream):
            assert found.gradient is not None
            if d_hidden is not None:
                d_hidden[part] = products.times_head(found.gradient, weight)
            if d_weight is not None:
                products.add_outer(d_weight, found.gradient, hidden[part])
            if d_bias is not None:
                d_bias.add_(found.gradient.sum(0, dtype=d_bias.dtype))
            del found
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None, None),
        )

"""The forward pass of linear layers with LoRA adapters, several candidates in one batch.

The base is frozen and the same for all, so its product runs once over all rows, whoever they belong to; each
candidate's rows then get the update of its own adapter. peft keeps the adapters and finds the layers; its own forward
pass, which is used wherever no ``Mixture`` is set, refuses different adapters in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moalign.ops import products
from moalign.ops.frozen_linear import FrozenLinear
from moalign.seeds import derive


@dataclass(frozen=True)
class Mixture:
    """Whose rows stand in the batch: the first ``rows[0]`` go through the adapter ``slots[0]``, and so on.

    ``dropout_seeds``: one per slot where adapter dropout is on, else None; masks are a function of seed and layer.
    """

    slots: tuple[str, ...]
    rows: tuple[int, ...]
    dropout_seeds: tuple[int, ...] | None = None


class AdaptedLinear(LoraLinear):
    """A linear layer with adapters; peft's own ``LoraLinear``, turned into this by ``take_over``.

    ``place`` tells layers apart in their dropout; ``mixture`` is set by ``mixed``.
    """

    place: int
    mixture: Mixture | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x W^T + b and, for each candidate's rows, + s dropout(x) A^T B^T."""
        mixture = self.mixture
        if mixture is None:
            adapter = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
            if self.disable_adapters or self.merged or args or kwargs or not self._is_plain(adapter):
                return super().forward(x, *args, **kwargs)
            mixture = Mixture((adapter,), (1,))
        elif self.merged or args or kwargs or any(slot in self.lora_variant for slot in mixture.slots):
            raise ValueError("only plain adapters that are not merged can share a batch")
        base: Any = self.base_layer
        ends = _ends(x, mixture)
        factors: list[Any] = [module[slot] for slot in mixture.slots for module in (self.lora_A, self.lora_B)]
        scalings = tuple(self.scaling[slot] for slot in mixture.slots)
        dropping = mixture.dropout_seeds is not None and any(self.dropout_rate(slot) for slot in mixture.slots)
        fast = type(base) in (nn.Linear, FrozenLinear) and x.dtype == base.weight.dtype == factors[0].weight.dtype
        if fast and not dropping and not torch.is_autocast_enabled(x.device.type):
            return _Linear.apply(x, base.weight, base.bias, ends, scalings, *(factor.weight for factor in factors))
        rows, updates, start = x.flatten(0, -2), [], 0
        for number, slot in enumerate(mixture.slots):
            down, up = factors[2 * number : 2 * number + 2]
            mine = rows[start : ends[number]].to(down.weight.dtype)
            if mixture.dropout_seeds is not None:
                mine = self.drop(mine, slot, mixture.dropout_seeds[number])
            updates.append(up(down(mine)) * scalings[number])
            start = ends[number]
        result = base(x)
        return result + torch.cat(updates).to(result.dtype).view(result.shape)

    def dropout_rate(self, slot: str) -> float:
        return getattr(self.lora_dropout[slot], "p", 0.0)

    def drop(self, x: Tensor, slot: str, seed: int) -> Tensor:
        """The adapter's dropout; the mask is a function of the seed, the layer and the shape."""
        rate = self.dropout_rate(slot)
        if not rate:
            return x
        generator = torch.Generator(x.device).manual_seed(derive(seed, self.place))
        return x * torch.empty_like(x).bernoulli_(1 - rate, generator=generator).div_(1 - rate)

    def _is_plain(self, adapter: str) -> bool:
        dropping = adapter in self.lora_A and self.lora_dropout[adapter].training and self.dropout_rate(adapter)
        return adapter in self.lora_A and adapter not in self.lora_variant and not dropping


def take_over(layer: LoraLinear, place: int) -> None:
    """From now on the layer computes as ``AdaptedLinear``; parameters and names stay."""
    layer.__class__ = AdaptedLinear
    layer.place, layer.mixture = place, None  # type: ignore[assignment]


@contextmanager
def mixed(layers: Sequence[AdaptedLinear], mixture: Mixture) -> Iterator[None]:
    """Within the context the layers take batches of that mixture.

    The backward pass belongs in it too: with gradient checkpointing it runs layers again.
    """
    for layer in layers:
        layer.mixture = mixture
    try:
        yield
    finally:
        for layer in layers:
            layer.mixture = None


def _ends(x: Tensor, mixture: Mixture) -> tuple[int, ...]:
    """Where each candidate's rows end in x.flatten(0, -2)."""
    total = sum(mixture.rows)
    if len(mixture.rows) > 1 and len(x) != total:
        raise ValueError(f"a batch of {len(x)} rows in a mixture of {total}")
    positions = x.numel() // x.shape[-1] // total if x.numel() else 0
    ends, end = [], 0
    for rows in mixture.rows:
        end += rows * positions
        ends.append(end)
    return tuple(ends)


class _Linear(Function):
    """One product with the frozen weights for all rows; each adapter's update is added where the product lies.

    In peft's layers every scaling and every sum is a pass over whole activations of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ends: Any, scalings: Any, *factors: Tensor
    ) -> Tensor:
        rows = x.flatten(0, -2)
        result = products.linear(rows, weight, bias)
        inner, start = [], 0
        for end, s, a, b in zip(ends, scalings, factors[::2], factors[1::2], strict=True):
            inner.append(products.linear(rows[start:end], a))
            result[start:end].addmm_(inner[-1], b.t(), alpha=s)
            start = end
        ctx.save_for_backward(rows, weight, *inner, *factors)
        ctx.ends, ctx.scalings, ctx.shape = ends, scalings, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *saved = ctx.saved_tensors
        inner, factors = saved[: len(ctx.ends)], saved[len(ctx.ends) :]
        grad = grad.flatten(0, -2)
        d_x = products.linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        d_factors: list[Tensor] = []
        start = 0
        for end, s, mine, a, b in zip(ctx.ends, ctx.scalings, inner, factors[::2], factors[1::2], strict=True):
            part = grad[start:end]
            d_inner = products.linear(part, b.t()).mul_(s)
            if d_x is not None:
                d_x[start:end].addmm_(d_inner, a)
            d_factors += [
                products.linear(d_inner.t(), rows[start:end].t()),
                products.linear(mine.t(), part.t()).t() * s,
            ]
            start = end
        return None if d_x is None else d_x.view(ctx.shape), None, None, None, None, *d_factors

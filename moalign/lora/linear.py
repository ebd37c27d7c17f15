"""The forward pass of linear layers with LoRA adapters, several candidates in one batch.

The base is frozen and the same for all, so its product runs once over all rows, whoever they belong to; each
candidate's rows then get the update of its own adapter. peft keeps the adapters and finds the layers; its own forward
pass, which is used wherever no ``Mixture`` is set, refuses different adapters in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

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

    ``tap``: told of the gradients of one candidate's adapter, if anybody wants them row by row.
    ``dropout_seeds``: one per slot where adapter dropout is on, else None. ``lengths``: that of each candidate's own
    rows, without the padding that others bring (None: as long as the batch's). Masks are a function of seed, layer and
    the candidate's own rows, whoever else is in the batch. ``gates`` [rows,L,r], of a single slot: what the rank
    directions of each of the L layers are multiplied by, row by row.
    """

    slots: tuple[str, ...]
    rows: tuple[int, ...]
    dropout_seeds: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    tap: Tap | None = None
    gates: Tensor | None = None

    @property
    def shapes(self) -> list[tuple[int, int | None]]:
        """Rows of each candidate, and their own length."""
        return list(zip(self.rows, self.lengths or [None] * len(self.rows), strict=True))


class Tap(Protocol):
    """Called in the backward pass for each factor of each layer with an adapter."""

    def __call__(self, left: Tensor, right: Tensor) -> None:
        """left[n,p], right[n,q]: the factor's gradient is the sum over the n positions of left outer right."""


@dataclass(frozen=True)
class Factors:
    """The adapters of some slots in one layer, side by side: ``a`` [K,r,in] and ``b`` [K,out,r], which are trained."""

    slots: tuple[str, ...]
    a: nn.Parameter
    b: nn.Parameter


class AdaptedLinear(LoraLinear):
    """A linear layer with adapters; peft's own ``LoraLinear``, turned into this by ``take_over``.

    ``place`` tells layers apart in their dropout; ``mixture`` is set by ``mixed``, ``stacked`` by ``stack``.
    """

    place: int
    mixture: Mixture | None
    stacked: Factors | None

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
        ends, (a, b) = _ends(x, mixture), self.factors(mixture.slots)
        scalings = tuple(self.scaling[slot] for slot in mixture.slots)
        dropping = mixture.dropout_seeds is not None and any(self.dropout_rate(slot) for slot in mixture.slots)
        if mixture.tap is not None:
            return self._tapped(x, mixture.tap, ends, scalings, a, b)
        gated = mixture.gates is not None
        fast = not gated and type(base) in (nn.Linear, FrozenLinear) and x.dtype == base.weight.dtype == a.dtype
        if fast and not dropping and not torch.is_autocast_enabled(x.device.type):
            return _Linear.apply(x, base.weight, base.bias, ends, scalings, a, b)
        rows = x.flatten(0, -2).to(a.dtype)
        if mixture.dropout_seeds is not None:
            parts = zip(_split(rows, ends), mixture.slots, mixture.dropout_seeds, mixture.shapes, strict=True)
            rows = torch.cat([self.drop(*part) for part in parts])
        result = base(x)
        if mixture.gates is None:
            update = _update(rows, ends, scalings, a, b)
        else:
            inner = (rows @ a[0].mT).view(len(x), -1, a.shape[1]) * (scalings[0] * mixture.gates[:, self.place, None])
            update = inner.flatten(0, 1) @ b[0].mT
        return result + update.to(result.dtype).view(result.shape)

    def _tapped(
        self, x: Tensor, tap: Tap, ends: tuple[int, ...], scalings: tuple[float, ...], a: Tensor, b: Tensor
    ) -> Tensor:
        """The same without dropout, in plain operations whose gradients the tap is told; the factors get none."""
        rows = x.flatten(0, -2).to(a.dtype)
        first = _product(rows, ends, a.detach().mT)
        if torch.is_grad_enabled():
            first.requires_grad_()  # in the first layer nothing that comes in has a gradient
        inner = first * scalings[0]
        update = _product(inner, ends, b.detach().mT)
        if torch.is_grad_enabled():
            known, reduced = rows.detach(), inner.detach()
            first.register_hook(lambda gradient: tap(gradient, known))
            update.register_hook(lambda gradient: tap(gradient, reduced))
        result = self.base_layer(x)
        return result + update.to(result.dtype).view(result.shape)

    def factors(self, slots: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """A [K,r,in] and B [K,out,r] of these adapters, with the graph to where they are trained."""
        held = self.stacked
        if held is not None and set(slots) <= set(held.slots):
            places = [held.slots.index(slot) for slot in slots]
            if places == list(range(len(held.slots))):
                return held.a, held.b
            first, last = places[0], places[-1] + 1
            chosen: Any = slice(first, last) if places == list(range(first, last)) else places
            return held.a[chosen], held.b[chosen]
        sides = ([cast(nn.Linear, side[slot]).weight for slot in slots] for side in (self.lora_A, self.lora_B))
        a, b = (each[0].unsqueeze(0) if len(each) == 1 else torch.stack(each) for each in sides)
        return a, b

    def dropout_rate(self, slot: str) -> float:
        return getattr(self.lora_dropout[slot], "p", 0.0)

    def drop(self, x: Tensor, slot: str, seed: int, shape: tuple[int, int | None]) -> Tensor:
        """The adapter's dropout on one candidate's positions [n,in]; ``shape``: its rows and their own length."""
        rate, (rows, length) = self.dropout_rate(slot), shape
        if not rate or not rows:
            return x
        generator = torch.Generator(x.device).manual_seed(derive(seed, self.place))
        mask = torch.ones_like(x).view(rows, -1, x.shape[-1])
        own = mask[:, :length]
        own.copy_(torch.empty_like(own).bernoulli_(1 - rate, generator=generator).div_(1 - rate))
        return x * mask.view_as(x)

    def _is_plain(self, adapter: str) -> bool:
        dropping = adapter in self.lora_A and self.lora_dropout[adapter].training and self.dropout_rate(adapter)
        return adapter in self.lora_A and adapter not in self.lora_variant and not dropping


def take_over(layer: LoraLinear, place: int) -> None:
    """From now on the layer computes as ``AdaptedLinear``; parameters and names stay."""
    layer.__class__ = AdaptedLinear
    # mypy does not follow the change of class
    layer.place, layer.mixture, layer.stacked = place, None, None  # type: ignore[assignment]


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


# --- the products ---------------------------------------------------------------------------------------------------


def _split(rows: Tensor, ends: tuple[int, ...]) -> Sequence[Tensor]:
    """Each candidate's rows."""
    return rows.split([end - start for start, end in zip((0, *ends), ends, strict=False)])


def _each(rows: Tensor, ends: tuple[int, ...]) -> Tensor | None:
    """The rows as [K,n,...], a view, where every candidate has the same number of them."""
    even = all(end == (place + 1) * ends[0] for place, end in enumerate(ends))
    return rows.view(len(ends), ends[0], -1) if even else None


def _product(rows: Tensor, ends: tuple[int, ...], matrices: Tensor) -> Tensor:
    """[N,m]: each candidate's rows [n,d] times its own matrix, of ``matrices`` [K,d,m]."""
    each = _each(rows, ends)
    if each is not None:
        return torch.bmm(each, matrices).flatten(0, 1)
    return torch.cat([part @ matrix for part, matrix in zip(_split(rows, ends), matrices.unbind(), strict=True)])


def _add_product(total: Tensor, rows: Tensor, ends: tuple[int, ...], matrices: Tensor) -> None:
    """total[N,m] += what ``_product`` gives, where it lies."""
    each, sums = _each(rows, ends), _each(total, ends)
    if each is not None and sums is not None:
        sums.baddbmm_(each, matrices)
        return
    for mine, part, matrix in zip(_split(total, ends), _split(rows, ends), matrices, strict=True):
        mine.addmm_(part, matrix)


def _outer(left: Tensor, right: Tensor, ends: tuple[int, ...]) -> Tensor:
    """[K,p,q]: for each candidate the sum over its rows of left[n,p] outer right[n,q]."""
    lefts, rights = _each(left, ends), _each(right, ends)
    if lefts is not None and rights is not None:
        return torch.bmm(lefts.mT, rights)
    parts = zip(_split(left, ends), _split(right, ends), strict=True)
    return torch.stack([mine.t() @ other for mine, other in parts])


def _scale(rows: Tensor, ends: tuple[int, ...], scalings: tuple[float, ...]) -> Tensor:
    """Each candidate's rows times its own factor, where they lie."""
    if len(set(scalings)) == 1:
        return rows.mul_(scalings[0])
    for part, scaling in zip(_split(rows, ends), scalings, strict=True):
        part.mul_(scaling)
    return rows


def _update(rows: Tensor, ends: tuple[int, ...], scalings: tuple[float, ...], a: Tensor, b: Tensor) -> Tensor:
    """s x A^T B^T, [N,out], in the adapters' own precision."""
    return _product(_scale(_product(rows, ends, a.mT), ends, scalings), ends, b.mT)


class _Linear(Function):
    """One product with the frozen weights for all rows; the adapters' updates are added where that product lies.

    In peft's layers every scaling and every sum is a pass over whole activations of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ends: Any, scalings: Any, a: Tensor, b: Tensor
    ) -> Tensor:
        rows = x.flatten(0, -2)
        result = products.linear(rows, weight, bias)
        inner = _scale(_product(rows, ends, a.mT), ends, scalings)
        _add_product(result, inner, ends, b.mT)
        ctx.save_for_backward(rows, weight, inner, a, b)
        ctx.ends, ctx.scalings, ctx.shape = ends, scalings, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inner, a, b = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        d_inner = _scale(_product(grad, ctx.ends, b), ctx.ends, ctx.scalings)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = products.linear(grad, weight.t())
            _add_product(d_x, d_inner, ctx.ends, a)
            d_x = d_x.view(ctx.shape)
        d_a, d_b = _outer(d_inner, rows, ctx.ends), _outer(grad, inner, ctx.ends)
        return d_x, None, None, None, None, d_a, d_b

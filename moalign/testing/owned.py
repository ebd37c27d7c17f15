"""Whether a plugin's own parameters are what the engine trains and keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from moalign.api import Batch, MoalignError
from moalign.testing.batch import WIDTH, plain_terms
from moalign.testing.review import Review, described
from moalign.testing.watched import copied

if TYPE_CHECKING:
    from torch import Tensor

    from moalign.testing.objective import Trial

ASKING = "asking for the first values of its parameters"


class Owner(Protocol):
    """A plugin under review that has a loss and parameters."""

    @property
    def review(self) -> Review: ...

    def batch(self) -> Batch: ...

    def loss(self, tried: str, batch: Batch) -> Tensor: ...


def first_values(t: Trial, seed: int = 0) -> dict[str, Tensor]:
    """As the plugin gives them for a model of width 4."""
    try:
        return named_tensors(t.review, t.seed + seed, t.plugin.parameters, WIDTH)
    except MoalignError as error:
        t.review.fail(ASKING, described(error), "return tensors by name", error)


def named_tensors(review: Review, seed: int, parameters: Callable[..., Any], *arguments: Any) -> dict[str, Tensor]:
    """What ``parameters`` gives for these arguments and a generator. A UserError of its own is raised as it is."""
    import torch

    tried, change = ASKING, "return tensors by name"
    generator = torch.Generator().manual_seed(seed)
    found = review.call(tried, change, parameters, *arguments, generator)
    review.require(isinstance(found, Mapping), tried, type(found).__name__, change)
    for name, value in found.items():
        good = isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.device.type == "cpu"
        what = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        change = "return finite float32 tensors on the CPU by name"
        whole = good and isinstance(name, str) and bool(value.isfinite().all())
        review.require(whole, tried, f"{name!r}: {what}", change)
    return dict(found)


def moved(values: Mapping[str, Tensor], seed: int, dtype: Any) -> dict[str, Tensor]:
    """Somewhere else, as training has it; the same place for every dtype, to its rounding."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value.double() + 0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, value in values.items()
    }


def parameters_have_first_values(t: Trial) -> None:
    """Finite float32 by name, a function of the arguments, and a sound learning rate for each."""
    are_first_values(t.review, first_values(t), first_values(t), t.plugin.lr_factor)


def are_first_values(
    review: Review, first: Mapping[str, Tensor], again: Mapping[str, Tensor], lr_factor: Callable[[str], float]
) -> None:
    """Twice the same, where they come of the same seed, and a sound learning rate for each."""
    tried, change = "asking twice with generators of the same seed", "draw from the generator that is handed over only"
    same = first.keys() == again.keys() and all(value.equal(again[name]) for name, value in first.items())
    review.require(same, tried, "other values", change)
    for name in first:
        factor = review.call(f"lr_factor({name!r})", "return a number", lr_factor, name)
        good = isinstance(factor, int | float) and 0 <= factor < math.inf
        review.require(good, f"lr_factor({name!r})", f"{factor!r}", "return a finite number, not below 0")


def parameters_are_trained(t: Owner) -> None:
    """Every one has a finite gradient."""
    import torch

    batch = t.batch()
    names = list(batch.parameters)
    if not names:
        return
    leaves = {name: value.clone().requires_grad_() for name, value in batch.parameters.items()}
    losses = t.loss("a batch", replace(batch, parameters=leaves))
    tried = "the gradient of the summed losses in the loss's own parameters"
    change = "let the loss read batch.parameters, or do not own it; what does not learn is an option or a constant"
    t.review.require(losses.requires_grad, tried, "losses without a graph", change)
    found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    for name, gradient in zip(names, found, strict=True):
        some = gradient is not None and bool(gradient.any())
        t.review.require(some, tried, f"none for '{name}'", change)
        finite = bool(gradient.isfinite().all())
        t.review.require(finite, tried, f"one for '{name}' that is not finite", "guard divisions, roots and logarithms")


def losses_of(t: Trial, batch: Any, names: Sequence[str]) -> Callable[..., Tensor]:
    """The losses as a function of these tensors of the batch, and then of the parameters."""
    terms = plain_terms(batch)

    def losses(*given: Tensor) -> Tensor:
        values = [value * 1 for value in given]
        own: Any = dict(zip(names, values, strict=False))
        own["parameters"] = dict(zip(batch.parameters, values[len(names) :], strict=True))
        return t.plugin.loss(t.told(replace(copied(batch), **own)), copied(terms))

    return losses

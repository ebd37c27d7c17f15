"""An adapter drawn between trained candidates: IBCL (arXiv 2305.14782) with the posteriors that a run keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from moalign.errors import RunError
from moalign.lora import posterior, posterior_file
from moalign.lora.mixing import Adapter
from moalign.seeds import derive


def drawn(
    adapters: Sequence[Adapter], folders: Sequence[Path], shares: Sequence[float], mass: float, seed: int
) -> Adapter:
    """The adapter, of their own rank and scaling, that is drawn from these adapters' posteriors combined by ``shares``.

    Each weight is uniform within its central interval of probability ``mass``, a function of ``seed``; with mass 0 it
    is the mean of the combined posterior. Rounded to float32 once.

    Raises RunError where ranks, scalings or targets differ, or a posterior is missing or of another base model;
    CorruptFileError where one is damaged or of another adapter.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if _form(other) != _form(first):
            raise RunError(
                f"{other.name}: its rank, scaling or targets are not those of {first.name}, so their posteriors cannot "
                "be combined; without --posterior their adapters can be mixed"
            )
    shapes = _shapes(first)
    found = [posterior_file.read(folder, shapes, first.base) for folder in folders]
    generator = torch.Generator().manual_seed(derive(seed, "posterior"))
    weights = posterior.draw(posterior.combine(found, shares), mass, generator)
    name = f"posterior of {' + '.join(adapter.name for adapter in adapters)}"
    return replace(first, name=name, tensors={key: tensor.float() for key, tensor in weights.items()})


def _form(adapter: Adapter) -> tuple[float, bool, dict[str, tuple[int, ...]]]:
    return adapter.alpha, adapter.rslora, _shapes(adapter)


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}

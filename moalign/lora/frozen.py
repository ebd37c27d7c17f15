"""Slots for adapters that nobody trains: copies of others, and sums of them in delta space, of whatever rank."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from moalign.errors import RunError
from moalign.lora import mixing
from moalign.lora.adapters import layers, weights

_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Size:
    """Frobenius norms over all layers: of what an adapter adds to the base, and of what compressing it has left out."""

    kept: float
    cut: float = 0.0


def duplicate(model: PeftModel, source: str, target: str) -> None:
    """Make the slot ``target`` what the slot ``source`` is now, to the last bit, padding and scaling included."""
    with torch.no_grad():
        for layer in layers(model):
            for kind in layer.adapter_layer_names:
                held = getattr(layer, kind)
                if source in held:
                    for mine, theirs in zip(_parameters(held, target), _parameters(held, source), strict=True):
                        mine.data = theirs.detach().clone()
            if source in layer.scaling:
                layer.scaling[target] = layer.scaling[source]
    model.peft_config[target] = copy(model.peft_config[source])


def adds_nothing(model: PeftModel, slot: str) -> bool:
    """Whether the adapter is 0, as it is before its first step."""
    held = [
        getattr(layer, kind) for layer in layers(model) for kind in layer.adapter_layer_names if kind.endswith("_B")
    ]
    return not any(bool(each.any()) for side in held if slot in side for each in _parameters(side, slot))


def place(model: PeftModel, slot: str, tensors: Mapping[str, Tensor], scaling: float = 1.0, name: str = "") -> None:
    """Give the slot these tensors in the peft format, of one rank; layers that they leave out get none.

    Raises RunError, ``name`` in front, where they are of a layer that has no adapter here, or of another size.
    """
    given, rank = dict(mixing.factors(tensors, name or "adapter")), rank_of(tensors)
    for layer_name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        down, up = (cast(nn.Linear, side[slot]).weight for side in (module.lora_A, module.lora_B))
        none = down.new_zeros(rank, down.shape[1]), up.new_zeros(up.shape[0], rank)
        a, b = given.pop(_PREFIX + layer_name, none)
        if (a.shape[1], b.shape[0]) != (down.shape[1], up.shape[0]):
            size, here = f"{b.shape[0]} x {a.shape[1]}", f"{up.shape[0]} x {down.shape[1]}"
            raise RunError(f"{name}: {layer_name} is {size}, in this run's model it is {here}")
        down.data, up.data = a.to(down, copy=True), b.to(up, copy=True)
        module.scaling[slot] = scaling
    if given:
        raise RunError(
            f"{name}: it adapts {min(given).removeprefix(_PREFIX)}, and the run does not; name it in model.lora.targets"
        )
    config = copy(cast(LoraConfig, model.peft_config[slot]))
    config.r, config.lora_alpha = rank, scaling * rank  # type: ignore[assignment]  # peft says int
    model.peft_config[slot] = config


def add_up(model: PeftModel, target: str, shares: Mapping[str, float], rank: int | None) -> Size:
    """Make ``target``, which may be among them, the sum of share times s B A of these slots.

    Their ranks add up; where that is more than ``rank``, the sum is replaced by the nearest of this rank. Raises
    RunError where an adapter is not of linear layers alone.
    """
    slots = list(shares)
    adapters = [weights(model, slot) for slot in slots]
    scalings = [scaling(model, slot) for slot in slots]
    tensors = mixing.mix(adapters, list(shares.values()), scalings, names=slots)
    whole = norm(tensors)
    lost = 0.0
    if rank is not None and rank_of(tensors) > rank:
        tensors, truncation = mixing.compress(tensors, rank)
        lost = truncation.total
    place(model, target, tensors)
    return Size(whole * math.sqrt(1 - lost**2), whole * lost)


def scaling(model: PeftModel, slot: str) -> float:
    """s of the delta s B A of the adapter in the slot."""
    return next(float(layer.scaling[slot]) for layer in layers(model) if slot in layer.scaling)


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    return next(len(tensor) for name, tensor in tensors.items() if name.endswith(_A))


def norm(tensors: Mapping[str, Tensor], scaling: float = 1.0) -> float:
    """Frobenius norm of s B A over all layers, without forming it: |B A|^2 = trace((B^T B)(A A^T))."""
    pairs = [(a.double(), b.double()) for a, b in mixing.factors(tensors).values()]
    squares = [float(((b.T @ b) * (a @ a.T)).sum()) for a, b in pairs]
    return abs(scaling) * math.sqrt(max(0.0, math.fsum(squares)))


def digest(tensors: Mapping[str, Tensor], scaling: float = 1.0) -> str:
    """sha256 over names, values and scaling."""
    found = hashlib.sha256(repr(float(scaling)).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _parameters(held: Any, slot: str) -> list[nn.Parameter]:
    return [held[slot]] if isinstance(held, nn.ParameterDict) else list(held[slot].parameters())

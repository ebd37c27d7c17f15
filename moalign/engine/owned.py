"""Tensors that a loss or a conditioner owns, such as a value head: made, and a loss's kept beside the adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moalign import door, storage
from moalign.api import AdapterShape, Conditioner, Objective
from moalign.errors import PluginError, RunError
from moalign.seeds import derive

FILE = "objective.safetensors"


def first_values(
    owner: Objective | Conditioner, about: int | AdapterShape, seed: int, candidate: str = ""
) -> dict[str, Tensor]:
    """What the plugin's ``parameters`` gives, on the CPU, in the order of the names; empty where it owns nothing.

    ``about``: the width of a hidden state for a loss, the adapter's shape for a conditioner.

    Raises PluginError where it is not finite float32 by name.
    """
    generator = torch.Generator().manual_seed(derive(seed, "parameters"))
    found = door.call(owner, "parameters", about, generator, candidate=candidate)
    who = f"{door.origin(owner).who}, in parameters"
    if not isinstance(found, Mapping):
        raise PluginError(f"{who}: it must return tensors by name, not {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise PluginError(f"{who}: it must return tensors by name, not {type(value).__name__} for {name!r}")
        if value.dtype != torch.float32 or value.device.type != "cpu" or not bool(value.isfinite().all()):
            kind = f"{str(value.dtype).removeprefix('torch.')} on {value.device}"
            raise PluginError(f"{who}: '{name}' must be finite float32 on cpu; it is {kind}")
    return {name: found[name].detach().clone() for name in sorted(found)}


def lr_factor(owner: Objective | Conditioner, name: str, candidate: str = "") -> float:
    """Of the learning rate, for one parameter. Raises PluginError where it is no finite number from 0 on."""
    factor = door.call(owner, "lr_factor", name, candidate=candidate)
    if not (isinstance(factor, int | float) and 0 <= factor < math.inf):
        who = door.origin(owner).who
        raise PluginError(f"{who}, in lr_factor: it must return a finite number from 0 on, not {factor!r}")
    return float(factor)


def write(directory: Path, parameters: Mapping[str, Tensor], base_fingerprint: str) -> None:
    """``objective.safetensors``; nothing where there are none."""
    if parameters:
        storage.write_tensors(directory / FILE, parameters, {"base": base_fingerprint})


def read(directory: Path, first: dict[str, Tensor], base_fingerprint: str) -> dict[str, Tensor]:
    """What is written in a parent's folder in place of the first values; these where it holds no such file.

    Raises RunError where it belongs to another base model or another loss, CorruptFileError where it is damaged.
    """
    file = directory / FILE
    if not first or not file.exists():
        return first
    if storage.read_metadata(file).get("base") != base_fingerprint:
        raise RunError(f"{file}: these parameters were trained with another base model")
    tensors = storage.read_tensors(file)
    expected, found = _shapes(first), _shapes(tensors)
    if expected != found:
        raise RunError(
            f"{file}: it holds {found}, and the loss owns {expected}; start from a candidate of the same loss"
        )
    return {name: tensors[name] for name in first}


def _shapes(tensors: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(tensors[name].shape) for name in sorted(tensors)}

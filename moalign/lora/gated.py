"""Adapters whose rank directions are scaled by a preference, and the plain adapter that each preference has.

With gates g [L,r] layer l computes x W^T + s (g_l * x A^T) B^T, which is what a LoRA adapter of A and B diag(g_l)
computes. So a gated adapter is a family of plain ones, and a file of it is all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from moalign import storage
from moalign.errors import CorruptFileError, RunError
from moalign.lora.adapters import active, layers, mixed, weights
from moalign.lora.linear import AdaptedLinear, Mixture

FILE = "conditioner.safetensors"
_ADAPTER, _OWN, _B = "adapter/", "conditioner/", ".lora_B.weight"


def under(model: PeftModel, adapter: str | None, gates: Tensor | None = None) -> AbstractContextManager[None]:
    """Within the context the model runs with this adapter (None: the bare base), gated row by row by ``gates``
    [rows,L,r] where there are any."""
    if adapter is None or gates is None:
        return active(model, adapter)
    return mixed(model, Mixture((adapter,), (len(gates),), gates=gates))


def fold(model: PeftModel, adapter: str, gates: Tensor) -> None:
    """Make the adapter in the slot the plain one that it is with these gates [L,r]."""
    with torch.no_grad():
        for layer in layers(model):
            if isinstance(layer, AdaptedLinear):
                cast(nn.Linear, layer.lora_B[adapter]).weight.mul_(gates[layer.place])


@dataclass(frozen=True)
class Family:
    """Tensors of the adapter in the peft format, before any gate; the conditioner's own; layers in the gates' order."""

    tensors: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    layers: tuple[str, ...]

    @property
    def rank(self) -> int:
        return next(len(tensor) for name, tensor in self.tensors.items() if not name.endswith(_B))

    def at(self, gates: Tensor) -> dict[str, Tensor]:
        """The plain adapter's tensors with these gates [L,r]."""
        place = {layer: number for number, layer in enumerate(self.layers)}
        return {
            name: tensor * gates[place[_layer(name)]] if name.endswith(_B) else tensor
            for name, tensor in self.tensors.items()
        }


def family(model: PeftModel, adapter: str, own: Mapping[str, Tensor]) -> Family:
    """Of the adapter in a slot, whose gates the tensors ``own`` make."""
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    order = tuple(names[id(layer)] for layer in layers(model))
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in own.items()}
    return Family(weights(model, adapter), copies, order)


def write(made: Family, directory: Path, base_fingerprint: str) -> None:
    """``conditioner.safetensors``."""
    tensors = {_ADAPTER + name: tensor for name, tensor in made.tensors.items()}
    tensors |= {_OWN + name: tensor for name, tensor in made.own.items()}
    storage.write_tensors(directory / FILE, tensors, {"base": base_fingerprint, "layers": json.dumps(made.layers)})


def read(directory: Path, base_fingerprint: str) -> Family:
    """What ``write`` wrote. Raises RunError for another base model, CorruptFileError where it is not that."""
    file = directory / FILE
    metadata = storage.read_metadata(file)
    if metadata.get("base") != base_fingerprint:
        raise RunError(f"{file}: this adapter was trained on another base model")
    tensors = storage.read_tensors(file)
    own = {name.removeprefix(_OWN): tensor for name, tensor in tensors.items() if name.startswith(_OWN)}
    adapter = {name.removeprefix(_ADAPTER): tensor for name, tensor in tensors.items() if name.startswith(_ADAPTER)}
    try:
        order = tuple(json.loads(metadata["layers"]))
    except (KeyError, ValueError, TypeError):
        raise CorruptFileError(f"{file}: it does not say which layers its gates belong to") from None
    if set(order) != {_layer(name) for name in adapter} or len(own) + len(adapter) != len(tensors):
        raise CorruptFileError(f"{file}: its tensors are not those of the layers that it names")
    return Family(adapter, own, order)


def _layer(name: str) -> str:
    """The module's name in the base model, of a tensor's in the peft format."""
    return name.removeprefix("base_model.model.").rpartition(".lora_")[0]

"""Adapters that are trained together lie side by side: A [K,r,in] and B [K,out,r] of every layer, in one block."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from moalign.errors import ModelError
from moalign.lora.adapters import add_slots, layers, parameters
from moalign.lora.linear import AdaptedLinear, Factors

# torch would like it more if a layer's factors of all slots were contiguous; here each slot's row is
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


@dataclass(frozen=True)
class Stack:
    """``block`` [K,P]: a row for each slot with all its factors, layer after layer; ``gradients`` likewise.

    ``parameters``: what the optimizer of one slot steps: its row, with its gradients' row, and what layers of other
    kinds hold for it. The adapters' own tensors, by which everything else reads and writes them, are views of the rows.
    """

    block: Tensor
    gradients: Tensor
    parameters: Mapping[str, list[nn.Parameter]]


def stack(model: PeftModel, slots: Sequence[str]) -> Stack:
    """Put these slots, made where they are missing, side by side, the only ones that are trained until the next call.

    Raises ModelError if one of their tensors is not float32: updates of lower precision round to nothing.
    """
    add_slots(model, slots)
    model.set_adapter(slots[0])
    model.requires_grad_(False)
    for slot in slots:
        for parameter in parameters(model, slot):
            if parameter.dtype != torch.float32:
                raise ModelError(f"a parameter of the adapter {slot} is {parameter.dtype}, not float32")
    stacked = [layer for layer in layers(model) if isinstance(layer, AdaptedLinear)]
    first = parameters(model, slots[0])[0]
    size = sum(parameter.numel() for layer in stacked for parameter in _factors(layer, slots[0]))
    block = torch.empty(len(slots), size, device=first.device)
    gradients = torch.zeros_like(block)
    start = 0
    for layer in stacked:
        sides = []
        for number, example in enumerate(_factors(layer, slots[0])):
            end = start + example.numel()
            values = block[:, start:end].view(len(slots), *example.shape)
            for place, slot in enumerate(slots):
                own = _factors(layer, slot)[number]
                values[place].copy_(own.data)
                own.data = values[place]
            sides.append(nn.Parameter(values))
            sides[-1].grad = gradients[:, start:end].view_as(values)
            start = end
        layer.stacked = Factors(tuple(slots), *sides)
    rows = {}
    for place, slot in enumerate(slots):
        row = nn.Parameter(block[place])
        row.grad = gradients[place]
        rows[slot] = [row, *_elsewhere(model, slot)]
    return Stack(block, gradients, rows)


def _factors(layer: AdaptedLinear, slot: str) -> list[nn.Parameter]:
    return [cast(nn.Parameter, cast(nn.Linear, side[slot]).weight) for side in (layer.lora_A, layer.lora_B)]


def _elsewhere(model: PeftModel, slot: str) -> list[nn.Parameter]:
    """What layers of another kind, such as embeddings, hold for the slot; trained where it is alone in its batch."""
    here = {id(p) for layer in layers(model) if isinstance(layer, AdaptedLinear) for p in _factors(layer, slot)}
    others = [parameter for parameter in parameters(model, slot) if id(parameter) not in here]
    for parameter in others:
        parameter.requires_grad_(True)
        parameter.grad = torch.zeros_like(parameter)
    return others

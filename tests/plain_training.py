"""Adapters as plain peft trains them, each tensor a parameter of its own and none in a block with others."""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from moalign import lora
from moalign.lora.linear import AdaptedLinear


def trainable(model: PeftModel, *adapters: str) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name, made the only ones that require a gradient; the first one is switched on."""
    for layer in lora.layers(model):
        if isinstance(layer, AdaptedLinear):
            layer.stacked = None
    model.set_adapter(adapters[0])
    model.requires_grad_(False)
    mine = {id(parameter) for adapter in adapters for parameter in lora.parameters(model, adapter)}
    chosen = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in mine}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen

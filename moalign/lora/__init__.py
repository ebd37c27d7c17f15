"""LoRA adapters: where they sit and how they are written (``adapters``), what they compute (``linear``)."""

from moalign.lora.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    active,
    adapted_head,
    add_slots,
    configuration,
    initialise,
    inject,
    layers,
    mixed,
    parameters,
    read,
    room,
    upper_layers,
    weights,
    why_not_together,
    write,
)
from moalign.lora.gated import under
from moalign.lora.linear import Mixture
from moalign.lora.stack import Stack, stack

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "Mixture",
    "Stack",
    "active",
    "adapted_head",
    "add_slots",
    "configuration",
    "initialise",
    "inject",
    "layers",
    "mixed",
    "parameters",
    "read",
    "room",
    "stack",
    "under",
    "upper_layers",
    "weights",
    "why_not_together",
    "write",
]

"""Adapters in a model as anybody has it: transformers' own base with peft's own layers, nothing of ours in it."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from moalign.errors import CorruptFileError, ModelError
from moalign.lora.adapters import wrapped
from moalign.lora.mixing import Adapter

NAME = "default"  # peft writes the adapter of this name without a folder of its own

_PLACED = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def attach(base: Any, adapter: Adapter) -> PeftModel:
    """The base with this adapter, for inference. Strict: the adapter's tensors are those that its targets ask for.

    Of its configuration only rank, scaling and where it sits are taken. Raises CorruptFileError where the two disagree
    or do not fit the base, ModelError where the targets match nothing.
    """
    places = {key: adapter.config.get(key) for key in _PLACED}
    for key, value in places.items():
        if not _plain(value):
            raise CorruptFileError(f"{adapter.name}: {key} is {value!r}, which names no layers")
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft says int, and divides whatever it gets
        use_rslora=adapter.rslora,
        lora_dropout=0.0,
        fan_in_fan_out=adapter.config.get("fan_in_fan_out") is True,
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        **places,  # type: ignore[arg-type]
    )
    try:
        model = wrapped(base, config, NAME)
    except ValueError as error:
        raise ModelError(f"{adapter.name}: its targets are not in this base model: {error}") from None
    own = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    if found != wanted:
        differing = sorted(set(found.items()) ^ set(wanted.items()))[0]
        raise CorruptFileError(f"{adapter.name}: tensors do not fit the model, first at {differing}")
    set_peft_model_state_dict(model, dict(adapter.tensors), adapter_name=NAME)
    return model.eval()


def _plain(value: object) -> bool:
    """Whether it is what peft takes for names or numbers of layers."""
    parts = value if isinstance(value, list) else [] if value is None else [value]
    return all(isinstance(part, str | int) and not isinstance(part, bool) for part in parts)


@torch.no_grad()
def merge(model: PeftModel) -> Any:
    """The base with the adapter added into its weights, W + s B A; the model that came in is used up.

    Summed in float64 and rounded once to the precision of W. Where the adapted head shares its weights with the
    embedding, it gets weights of its own first, for the embedding is not adapted. Raises ModelError for quantised
    weights, and for layers that share theirs, which cannot take up an update each.
    """
    base = cast(Any, model.get_base_model())
    head = base.get_output_embeddings()
    if isinstance(head, LoraLayer):
        _untie(base, cast(nn.Linear, head.get_base_layer()))
    uses = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        weight = cast(nn.Linear, module.get_base_layer()).weight
        if not weight.is_floating_point():
            raise ModelError(f"{name}: weights of type {weight.dtype} take up no adapter; use the unquantised base")
        if uses[id(weight)] > 1:
            raise ModelError(f"{name}: shares its weights with another layer, so they take up no adapter; do not merge")
        for side in (module.lora_A, module.lora_B, module.lora_embedding_A, module.lora_embedding_B):
            side.to(torch.float64)
        delta = cast(Any, module).get_delta_weight(NAME)
        weight.data = (weight.double() + delta).to(weight.dtype)
    return cast(Any, model).unload()


def _untie(base: Any, head: nn.Linear) -> None:
    """Weights of its own for a head that shares the embedding's."""
    if head.weight is base.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False

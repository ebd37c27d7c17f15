"""LoRA adapters through peft: inject, initialise, switch, write and read. Always float32, always strict."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from moalign import storage
from moalign.errors import CorruptFileError, ModelError, RunError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def configuration(
    r: int, alpha: float, targets: str | tuple[str, ...], dropout: float, rslora: bool, base_path: str
) -> LoraConfig:
    """peft's own configuration, so that peft resolves the targets and reads what we write."""
    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft says int, and divides whatever it gets
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=dropout,
        use_rslora=rslora,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_path,
    )


def inject(base: Any, config: LoraConfig, adapter: str) -> PeftModel:
    """The base with one more adapter, the base itself frozen. Raises ModelError where the targets match nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that it deprecates
            model = get_peft_model(base, config, adapter_name=adapter)
    except ValueError as error:
        raise ModelError(f"model.lora.targets: {error}") from None
    if isinstance(base.get_output_embeddings(), LoraLayer):
        raise ModelError("model.lora.targets: the output head cannot carry an adapter; leave it out of the targets")
    return model


def layers(model: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def initialise(model: PeftModel, adapter: str, seed: int) -> None:
    """Fresh weights (B is zero, so the policy is the base), a function of ``seed`` alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for layer in layers(model):
            device = cast(nn.Linear, layer.get_base_layer()).weight.device
            layer.reset_lora_parameters(adapter, init_lora_weights=True)
            cast(nn.Module, layer).to(device)


def trainable(model: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, made the only ones that require a gradient.

    Raises ModelError if one of them is not float32: updates of lower precision round to nothing.
    """
    model.set_adapter(adapter)
    marker = f".{adapter}."
    chosen: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        mine = "lora_" in name and (marker in name or name.endswith(f".{adapter}"))
        parameter.requires_grad_(mine)
        if mine:
            if parameter.dtype != torch.float32:
                raise ModelError(f"adapter parameter {name} is {parameter.dtype}, not float32")
            chosen[name] = parameter
    return chosen


@contextmanager
def active(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Within the context the model runs with this adapter, or (None) as the bare base; gradients are off.

    peft's own switch also flips ``requires_grad``, so what was trainable before is restored on leaving.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    current = model.active_adapter
    try:
        with torch.no_grad():
            if adapter is None:
                with model.disable_adapter():
                    yield
            else:
                model.set_adapter(adapter)
                yield
    finally:
        model.set_adapter(current)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, False))


def weights(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The adapter's tensors under the names of the peft file format, on the CPU, contiguous."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(state.items())}


def write(model: PeftModel, adapter: str, directory: Path, base_fingerprint: str) -> None:
    """``adapter_model.safetensors`` and ``adapter_config.json``; plain peft loads the directory as it is."""
    config: dict[str, Any] = model.peft_config[adapter].to_dict()
    config["inference_mode"] = True
    for key, value in config.items():
        if isinstance(value, set):
            config[key] = sorted(value)
    storage.write_tensors(directory / WEIGHTS_FILE, weights(model, adapter), {"base": base_fingerprint})
    storage.write_json(directory / CONFIG_FILE, json.loads(json.dumps(config, default=str)))


def read(model: PeftModel, adapter: str, directory: Path, base_fingerprint: str) -> None:
    """Load a written adapter into the slot ``adapter``, strictly.

    Nothing in ``adapter_config.json`` is obeyed: rank and scaling are compared with the run's own configuration.
    Raises RunError (another base, rank or target set) or CorruptFileError.
    """
    config: Mapping[str, Any] = storage.read_json(directory / CONFIG_FILE)
    mine = cast(LoraConfig, model.peft_config[adapter])
    for key, expected in (("peft_type", "LORA"), ("r", mine.r), ("use_rslora", mine.use_rslora)):
        if config.get(key) != expected:
            raise RunError(f"{directory / CONFIG_FILE}: {key} is {config.get(key)!r}, this run has {expected!r}")
    if not math.isclose(float(config.get("lora_alpha", math.nan)), float(mine.lora_alpha)):
        raise RunError(
            f"{directory / CONFIG_FILE}: lora_alpha is {config.get('lora_alpha')!r}, not {mine.lora_alpha!r}"
        )
    if storage.read_metadata(directory / WEIGHTS_FILE).get("base") != base_fingerprint:
        raise RunError(f"{directory}: this adapter was trained on another base model")
    tensors = storage.read_tensors(directory / WEIGHTS_FILE)
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in weights(model, adapter).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected_shapes:
        differing = sorted(set(found.items()) ^ set(expected_shapes.items()))[0]
        raise CorruptFileError(f"{directory / WEIGHTS_FILE}: tensors do not fit the model, first at {differing}")
    set_peft_model_state_dict(model, tensors, adapter_name=adapter)

"""LoRA adapters through peft: inject, initialise, switch, write and read. Always float32, always strict."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moalign import storage
from moalign.errors import CorruptFileError, ModelError, RunError
from moalign.ops import frozen_linear, products
from moalign.ops.frozen_linear import FrozenLinear

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
            # an adapter on a head whose weights are the embedding's too is the head's alone, and meant so
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            model = get_peft_model(base, config, adapter_name=adapter)
    except ValueError as error:
        raise ModelError(f"model.lora.targets: {error}") from None
    for layer in layers(model):
        if type(layer) is LoraLinear and type(layer.base_layer) in (nn.Linear, FrozenLinear):
            layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return model


class _Linear(Function):
    """x W^T + b + s (x A^T) B^T with W and b frozen: the update is added where the product lies, forward and backward.

    The same six products as peft's layers take; what is saved are its passes over whole activations to scale and add.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, s: float) -> Tensor:
        rows = x.flatten(0, -2)
        inner = _product(rows, a)
        result = _product(rows, weight, bias).addmm_(inner, b.t(), alpha=s)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.s, ctx.shape = s, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        d_inner = _product(grad, b.t()).mul_(ctx.s)
        d_x = _product(grad, weight.t()).addmm_(d_inner, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        d_a = _product(d_inner.t(), rows.t()) if ctx.needs_input_grad[3] else None
        d_b = _product(inner.t(), grad.t()).t() * ctx.s if ctx.needs_input_grad[4] else None
        return d_x, None, None, d_a, d_b, None


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias without autograd; on a CPU torch.mm leaves half of what oneDNN gets out of large ones."""
    if rows.numel() * len(weight) >= frozen_linear.WORTH_IT and products.uses_onednn(weight):
        return products.onednn_linear(rows.contiguous(), weight, bias)
    return nn.functional.linear(rows, weight, bias)


def _forward(layer: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``_Linear`` where one plain adapter of the base's precision is on and nothing is dropped, else peft's own."""
    base, adapters = layer.base_layer, layer.active_adapters
    if not (layer.disable_adapters or layer.merged or args or kwargs) and len(adapters) == 1:
        adapter = adapters[0]
        if adapter in layer.lora_A and adapter not in layer.lora_variant:
            down, up, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
            plain = up.bias is None and not (isinstance(dropout, nn.Dropout) and dropout.training)
            if plain and x.dtype == base.weight.dtype == down.weight.dtype:
                return _Linear.apply(x, base.weight, base.bias, down.weight, up.weight, layer.scaling[adapter])
    return LoraLinear.forward(layer, x, *args, **kwargs)


def layers(model: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


def dropout_of(layer: LoraLayer, adapter: str) -> nn.Dropout | None:
    """The adapter's dropout in this layer, where it has one."""
    dropout = dict(layer.lora_dropout.items()).get(adapter)
    return dropout if isinstance(dropout, nn.Dropout) else None


def adapted_head(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) whose logits hidden @ weight.T + bias are those of the output head as it is switched now.

    With an adapter, x W^T + s dropout(x) A^T B^T = [x, s dropout(x) A^T] [W, B]^T, dropout included.
    """
    weight, bias = cast(nn.Linear, head).weight, getattr(head, "bias", None)
    if not isinstance(head, LoraLayer) or head.disable_adapters:
        return hidden, weight, bias
    inputs, columns = [hidden], [weight]
    for adapter in head.active_adapters:
        if adapter in head.lora_A:
            down, up = cast(nn.Linear, head.lora_A[adapter]), cast(nn.Linear, head.lora_B[adapter])
            inner = down(head.lora_dropout[adapter](hidden.to(down.weight.dtype))) * head.scaling[adapter]
            inputs.append(inner.to(hidden.dtype))
            columns.append(up.weight.to(weight.dtype))
    return torch.cat(inputs, -1), torch.cat(columns, -1), bias


def initialise(model: PeftModel, adapter: str, seed: int) -> None:
    """Fresh weights (B is zero, so the policy is the base), a function of ``seed`` alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for layer in layers(model):
            device = next(layer.get_base_layer().parameters()).device
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

    Switches the layers alone; peft also flips ``requires_grad``, so what was trainable before is restored on leaving.
    """
    switched = list(layers(model))
    parameters = [parameter for layer in switched for parameter in cast(nn.Module, layer).parameters()]
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for layer in switched:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
        with torch.no_grad():
            yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)
            layer.set_adapter(model.active_adapter)
        for parameter, required in before:
            parameter.requires_grad_(required)


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

"""LoRA adapters through peft: inject, initialise, switch, write and read. Always float32, always strict."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from moalign import storage
from moalign.errors import CorruptFileError, ModelError, RunError
from moalign.lora import linear
from moalign.lora.linear import AdaptedLinear, Mixture

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def configuration(
    r: int,
    alpha: float,
    targets: str | tuple[str, ...],
    dropout: float,
    rslora: bool,
    base_path: str,
    layers: Sequence[int] | None = None,
) -> LoraConfig:
    """peft's own configuration, so that peft resolves the targets and reads what we write.

    ``layers``: the numbers of those that get adapters (None: all), for targets that are a list of names.
    """
    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft says int, and divides whatever it gets
        target_modules=targets if isinstance(targets, str) else list(targets),
        layers_to_transform=None if layers is None else list(layers),
        lora_dropout=dropout,
        use_rslora=rslora,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_path,
    )


def upper_layers(
    base: Any, share: str | float, targets: str | tuple[str, ...]
) -> tuple[str | tuple[str, ...], tuple[int, ...] | None]:
    """Targets and numbers of the top ``share`` of the layers, as ``configuration`` takes them; no numbers for all.

    Raises ModelError for a regular expression, which peft cannot restrict to some layers.
    """
    share = {"all": 1.0, "upper-half": 0.5}[share] if isinstance(share, str) else share
    if share == 1.0:
        return targets, None
    number = base.config.get_text_config().num_hidden_layers
    layers = tuple(range(number - math.ceil(share * number), number))
    if targets == "all-linear":
        head = base.get_output_embeddings()
        names = [name for name, each in base.named_modules() if isinstance(each, nn.Linear) and each is not head]
        targets = tuple(sorted({name.rsplit(".", 1)[-1] for name in names}))
    if isinstance(targets, str):
        raise ModelError("model.lora.layers: with a regular expression for targets, name the layers in it instead")
    return targets, layers


def wrapped(base: Any, config: LoraConfig, adapter: str) -> Any:
    """peft's model around the base, without what peft warns of in vain. Raises ValueError as peft does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that it deprecates
        # an adapter on a head whose weights are the embedding's too is the head's alone, and meant so
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return get_peft_model(base, config, adapter_name=adapter)


def inject(base: Any, config: LoraConfig, adapter: str) -> PeftModel:
    """The base with one more adapter, the base itself frozen. Raises ModelError where the targets match nothing."""
    try:
        model = wrapped(base, config, adapter)
    except ValueError as error:
        raise ModelError(f"model.lora.targets: {error}") from None
    for place, layer in enumerate(layers(model)):
        if type(layer) is LoraLinear:
            linear.take_over(layer, place)
    return model


def why_not_together(model: PeftModel) -> str | None:
    """Why several adapters cannot share a batch; None where they can."""
    if isinstance(cast(Any, model.get_base_model()).get_output_embeddings(), LoraLayer):
        return "the output head carries an adapter"
    other = next((type(layer).__name__ for layer in layers(model) if not isinstance(layer, AdaptedLinear)), None)
    return None if other is None else f"a layer of kind {other} carries an adapter"


def mixed(model: PeftModel, mixture: Mixture) -> AbstractContextManager[None]:
    """Within the context the rows of a batch go through several adapters, as ``mixture`` says."""
    return linear.mixed([layer for layer in layers(model) if isinstance(layer, AdaptedLinear)], mixture)


def add_slots(model: PeftModel, slots: Sequence[str], r: int | None = None) -> None:
    """Room for adapters under these names, configured as the first one is; ``r``: of another rank."""
    name, first = next(iter(model.peft_config.items()))
    first = copy(cast(LoraConfig, first))
    first.r = room(model, name) if r is None else r
    for slot in slots:
        if slot not in model.peft_config:
            model.add_adapter(slot, first)
    model.eval()  # peft makes new dropout layers ready for training


def layers(model: nn.Module) -> tuple[LoraLayer, ...]:
    """All layers with adapters; which they are is settled when the first adapter is injected."""
    if model not in _LAYERS:
        _LAYERS[model] = tuple(module for module in model.modules() if isinstance(module, LoraLayer))
    return _LAYERS[model]


_LAYERS: WeakKeyDictionary[nn.Module, tuple[LoraLayer, ...]] = WeakKeyDictionary()


def adapted_head(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) whose logits hidden @ weight.T + bias are those of the output head as it is switched now.

    With an adapter, x W^T + s dropout(x) A^T B^T = [x, s dropout(x) A^T] [W, B]^T, dropout included.
    """
    weight, bias = cast(nn.Linear, head).weight, getattr(head, "bias", None)
    if not isinstance(head, LoraLayer) or head.disable_adapters or head.merged:
        return hidden, weight, bias
    mixture = head.mixture if isinstance(head, AdaptedLinear) else None
    adapters = head.active_adapters if mixture is None else mixture.slots
    inputs, columns = [hidden], [weight]
    for adapter in adapters:
        if adapter in head.lora_A:
            down, up = _factors(head, adapter)
            mine = hidden.to(down.dtype)
            if isinstance(head, AdaptedLinear) and mixture is not None and mixture.dropout_seeds is not None:
                mine = head.drop(mine, adapter, mixture.dropout_seeds[0], (1, None))
            inputs.append((mine @ down.t() * head.scaling[adapter]).to(hidden.dtype))
            columns.append(up.to(weight.dtype))
    return torch.cat(inputs, -1), torch.cat(columns, -1), bias


def _factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    if isinstance(layer, AdaptedLinear):
        a, b = layer.factors((adapter,))
        return a[0], b[0]
    return cast(nn.Linear, layer.lora_A[adapter]).weight, cast(nn.Linear, layer.lora_B[adapter]).weight


def initialise(model: PeftModel, adapter: str, seed: int, r: int | None = None, alpha: float | None = None) -> None:
    """Fresh weights (B is zero, so the policy is the base), a function of ``seed`` alone.

    Rank ``r`` (default: as much as the slot has room for) and ``alpha`` (default: as the slot has it).

    Of an adapter of a smaller rank the rest is zero, and stays so: where a row of A and its column of B are zero, they
    have no gradient.
    """
    r = room(model, adapter) if r is None else r
    _shape(model, adapter, r, cast(LoraConfig, model.peft_config[adapter]).lora_alpha if alpha is None else alpha)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for layer in layers(model):
            layer.reset_lora_parameters(adapter, init_lora_weights=True)
        for kind, parameter in _tensors(model, adapter):
            if _is_down(kind):
                parameter[r:] = 0


def _shape(model: PeftModel, adapter: str, r: int, alpha: float) -> None:
    """Set rank and scaling of what the slot holds; ``r`` not above the slot's room."""
    config = copy(cast(LoraConfig, model.peft_config[adapter]))
    config.r, config.lora_alpha = r, alpha  # type: ignore[assignment]  # peft says int
    model.peft_config[adapter] = config
    for layer in layers(model):
        if adapter in layer.scaling:
            layer.scaling[adapter] = alpha / (math.sqrt(r) if config.use_rslora else r)


def room(model: PeftModel, adapter: str) -> int:
    """The largest rank that the slot holds."""
    return next(len(parameter) for kind, parameter in _tensors(model, adapter) if _is_down(kind))


def _is_down(name: str) -> bool:
    """Whether a tensor of an adapter is its A, [r, in], and not its B, [out, r]."""
    return "lora_A" in name or "lora_embedding_A" in name


def parameters(model: PeftModel, adapter: str) -> list[nn.Parameter]:
    return [parameter for _, parameter in _tensors(model, adapter)]


def _tensors(model: PeftModel, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's parameters, each with its kind, such as lora_A."""
    for layer in layers(model):
        for kind in layer.adapter_layer_names:
            held = getattr(layer, kind)
            if adapter in held:
                own = [held[adapter]] if isinstance(held, nn.ParameterDict) else held[adapter].parameters()
                yield from ((kind, parameter) for parameter in own)


@contextmanager
def active(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Within the context the model runs with this adapter, or (None) as the bare base; gradients are off.

    Sets what peft's layers read in their forward pass. peft's own switches flip ``requires_grad`` of every adapter in
    every layer as well, which costs as much as the pass of a small model, and nothing here has a gradient.
    """
    switched: list[Any] = list(layers(model))
    before = [(layer._active_adapter, layer._disable_adapters, getattr(layer, "mixture", None)) for layer in switched]
    try:
        for layer in switched:
            layer.mixture, layer._disable_adapters = None, adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        with torch.no_grad():
            yield
    finally:
        for layer, state in zip(switched, before, strict=True):
            layer._active_adapter, layer._disable_adapters, layer.mixture = state


def weights(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The adapter's tensors under the names of the peft file format, on the CPU, contiguous."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    r = cast(LoraConfig, model.peft_config[adapter]).r
    cut = {name: tensor[:r] if _is_down(name) else tensor[:, :r] for name, tensor in sorted(state.items())}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in cut.items()}


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

    Of ``adapter_config.json`` only rank, where the slot has room for it, and alpha are taken; the rest is compared with
    the run's own configuration. Raises RunError (another base, kind or target set, no room) or CorruptFileError.
    """
    config = storage.read_json(directory / CONFIG_FILE)
    if not isinstance(config, Mapping):
        raise CorruptFileError(f"{directory / CONFIG_FILE}: not the configuration of an adapter")
    mine = cast(LoraConfig, model.peft_config[adapter])
    for key, expected in (("peft_type", "LORA"), ("use_rslora", mine.use_rslora)):
        if config.get(key) != expected:
            raise RunError(f"{directory / CONFIG_FILE}: {key} is {config.get(key)!r}, this run has {expected!r}")
    r, alpha, most = config.get("r"), config.get("lora_alpha"), room(model, adapter)
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= most:
        raise RunError(f"{directory / CONFIG_FILE}: r is {r!r}, this run has room for ranks from 1 to {most}")
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise RunError(f"{directory / CONFIG_FILE}: lora_alpha is {alpha!r}; it must be a number above 0")
    if storage.read_metadata(directory / WEIGHTS_FILE).get("base") != base_fingerprint:
        raise RunError(f"{directory}: this adapter was trained on another base model")
    tensors = storage.read_tensors(directory / WEIGHTS_FILE)
    _shape(model, adapter, r, alpha)
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in weights(model, adapter).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected_shapes:
        differing = sorted(set(found.items()) ^ set(expected_shapes.items()))[0]
        raise CorruptFileError(f"{directory / WEIGHTS_FILE}: tensors do not fit the model, first at {differing}")
    missing = most - r
    padded = {
        name: nn.functional.pad(tensor, (0, 0, 0, missing) if _is_down(name) else (0, missing))
        for name, tensor in tensors.items()
    }
    set_peft_model_state_dict(model, padded, adapter_name=adapter)

"""Mixing of LoRA adapters in delta space: weighted sums of what they add to the base, never of their factors.

An adapter adds s B A to a weight, with A [r, in], B [out, r] and s = alpha / r (rsLoRA: alpha / sqrt(r)). A weighted
sum of such deltas is again one, of the ranks' sum: sum_k c_k s_k B_k A_k = s [f_1 B_1, f_2 B_2, ...] [A_1; A_2; ...]
with f_k = c_k s_k / s, for whatever s the result declares. That is exact. The mean of the Bs times the mean of the As
is another thing: it holds every cross product B_j A_k, and depends on the basis that each adapter happens to use.

``tensors`` are those of peft's file format: ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``, nothing else.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from moalign import storage
from moalign.errors import CorruptFileError, MoalignError, RunError
from moalign.lora import adapters as files
from moalign.lora import unsigned

_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")

# What may differ from peft's defaults: rank and scaling, which are accounted for, where the adapter sits, which the
# tensors' names say, and what has no part in the forward pass. Every other option is another kind of adapter.
_RANK = {"r", "lora_alpha", "use_rslora", "lora_dropout"}
_PLACE = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type"}
_PLACE |= {"fan_in_fan_out"}  # of GPT-2's layers, which keep their weights the other way round; A and B are as ever
_ORIGIN = {"base_model_name_or_path", "revision", "peft_version", "inference_mode"}
_FREE = _RANK | _PLACE | _ORIGIN

# How much of an adapter: of all its layers, or of so many blocks of them of equal size, from the bottom.
Coefficient = float | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as it is on disk. ``name`` is what errors call it, ``base`` the fingerprint of its base model."""

    name: str
    tensors: Mapping[str, Tensor]
    r: int
    alpha: float
    rslora: bool
    base: str
    config: Mapping[str, Any]

    @property
    def scaling(self) -> float:
        """s of the delta s B A."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(frozen=True, slots=True)
class Truncation:
    """What a compression lost, |delta - compressed| / |delta| in the Frobenius norm: per layer, and over all layers
    together (root of the sum of squares over root of the sum of squares). 0 where the delta itself is 0."""

    layers: Mapping[str, float]
    total: float


# --- adapters -------------------------------------------------------------------------------------------------------


def soup(
    adapters: Sequence[Adapter], coefficients: Sequence[Coefficient], r: int | None = None
) -> tuple[Adapter, Truncation]:
    """One adapter whose delta is sum_k c_k delta_k; with ``r``, the nearest to it of rank r, and what that lost.

    Without ``r`` the rank is the sum of the ranks with c_k != 0, and nothing is lost. The result declares alpha and
    rsLoRA of the first adapter that takes part where it has its rank, so that it fits where that one did (alone and
    with coefficient 1 it is that one, bit by bit); at any other rank it declares alpha = r without rsLoRA: s = 1.

    Raises RunError naming the adapter that has another base, other targets or other shapes than the first, and
    MoalignError for coefficients that are not finite or all 0.
    """
    names = [adapter.name for adapter in adapters]
    _check_coefficients(coefficients, len(adapters))
    for adapter in adapters:
        if adapter.base != adapters[0].base:
            raise RunError(f"{adapter.name}: trained on another base model than {names[0]}; only one base can be mixed")
    used = [adapter for adapter, coefficient in zip(adapters, coefficients, strict=True) if any(_numbers(coefficient))]
    first, rank = used[0], sum(adapter.r for adapter in used)
    r = rank if r is None else _checked_rank(r)
    alpha, rslora = (first.alpha, first.rslora) if r == first.r else (float(r), False)
    result = replace(first, name=" + ".join(adapter.name for adapter in used), r=r, alpha=alpha, rslora=rslora)

    scalings = [adapter.scaling for adapter in adapters]
    tensors = mix([adapter.tensors for adapter in adapters], coefficients, scalings, result.scaling, names)
    lost = Truncation(dict.fromkeys(factors(tensors), 0.0), 0.0)
    if r != rank:
        tensors, lost = compress(tensors, r)
    return replace(result, tensors=tensors), lost


def read(directory: Path, *, alone: bool = False, taken_for: str | None = None) -> Adapter:
    """An adapter that ``write`` or ``lora.write`` wrote; the files' checksums are verified.

    ``alone``: it will not be mixed, so that it may adapt embeddings as well. ``taken_for``: the base of which a file
    that names none, as peft itself writes them, is taken to be; None: such a file is refused.

    Raises RunError or CorruptFileError naming the file where it is not a plain LoRA adapter (DoRA, trained biases,
    ranks that differ by layer, ...), names no base, or where configuration and tensors disagree.
    """
    where = directory / files.CONFIG_FILE
    config = storage.read_json(where)
    if not isinstance(config, dict):
        raise CorruptFileError(f"{where}: not the configuration of an adapter")
    _refuse_other_kinds(config, where)
    r, alpha, rslora = _declared(config, where)
    weights = directory / files.WEIGHTS_FILE
    foreign = taken_for is not None and not unsigned.names_base(weights)
    base = taken_for if foreign else storage.read_metadata(weights).get("base")
    if not base:
        raise RunError(f"{weights}: names no base model, so it may be another one; only adapters of one base are mixed")
    tensors = unsigned.read(weights) if foreign else storage.read_tensors(weights)
    embeddings = sorted(name for name in tensors if name.endswith(_EMBEDDING))
    if embeddings and not alone:
        raise RunError(f"{weights}: {embeddings[0]} adapts an embedding; only adapters of linear layers are mixed")
    linear = {name: tensor for name, tensor in tensors.items() if name not in embeddings}
    for layer, (a, _) in (factors(linear, str(weights)) if linear or not embeddings else {}).items():
        if len(a) != r:
            raise CorruptFileError(f"{weights}: {layer} has rank {len(a)}, {files.CONFIG_FILE} says {r}")
    return Adapter(str(directory), tensors, r, alpha, rslora, base, config)


def write(adapter: Adapter, directory: Path) -> None:
    """``adapter_model.safetensors`` and ``adapter_config.json``; plain peft loads the directory as it is, and
    ``lora.read`` where its slot has this rank, alpha and rsLoRA."""
    declared = {"r": adapter.r, "lora_alpha": adapter.alpha, "use_rslora": adapter.rslora, "inference_mode": True}
    storage.write_tensors(directory / files.WEIGHTS_FILE, adapter.tensors, {"base": adapter.base})
    storage.write_json(directory / files.CONFIG_FILE, {**adapter.config, **declared})


def _declared(config: Mapping[str, Any], where: Path) -> tuple[int, float, bool]:
    r, alpha, rslora = config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False)
    if isinstance(r, int) and isinstance(alpha, int | float) and isinstance(rslora, bool) and r > 0 < alpha < math.inf:
        return r, float(alpha), rslora
    raise CorruptFileError(f"{where}: r {r!r}, lora_alpha {alpha!r}, use_rslora {rslora!r} are no rank and scaling")


def _refuse_other_kinds(config: Mapping[str, Any], where: Path) -> None:
    """RunError where an option, known to this peft or not, makes the delta something else than s B A."""
    plain = json.loads(json.dumps(LoraConfig().to_dict(), default=str))
    for key, value in config.items():
        if key not in _FREE and value != plain.get(key):
            raise RunError(f"{where}: {key} is {value!r}; only plain LoRA adapters can be mixed")
    if config.get("peft_type") != "LORA":
        raise RunError(f"{where}: peft_type is {config.get('peft_type')!r}; only plain LoRA adapters can be mixed")


# --- tensors --------------------------------------------------------------------------------------------------------


def factors(tensors: Mapping[str, Tensor], where: str = "adapter") -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A [r, in], B [out, r]), by name. Raises CorruptFileError, ``where`` in front, unless all tensors are
    finite and make such pairs."""
    if not tensors:
        raise CorruptFileError(f"{where}: holds no tensors")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in sorted({name.removesuffix(_A).removesuffix(_B) for name in tensors}):
        a, b = tensors.get(layer + _A), tensors.get(layer + _B)
        if a is None or b is None or layer in tensors:
            raise CorruptFileError(f"{where}: {layer} is not a pair of lora_A and lora_B")
        if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] > 0:
            raise CorruptFileError(
                f"{where}: {layer} has A {tuple(a.shape)} and B {tuple(b.shape)}, not (r, in), (out, r)"
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise CorruptFileError(f"{where}: {layer} holds numbers that are not finite")
        found[layer] = a, b
    return found


def mix(
    adapters: Sequence[Mapping[str, Tensor]],
    coefficients: Sequence[Coefficient],
    scalings: Sequence[float],
    scaling: float = 1.0,
    names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Tensors of rank sum r_k with ``scaling`` B A = sum_k c_k s_k B_k A_k, exactly; factors with c_k = 0 are dropped.

    c_k s_k / ``scaling`` is folded into B_k alone, so A is the As as they were. With the default the result is a peft
    adapter of alpha = r. Any finite coefficients: they need not be positive nor sum to 1. Several for one adapter are
    those of as many blocks of the adapted layers, of equal size, from the bottom: of n layers in K blocks layer i, from
    0, is in block floor(i K / n), so with more blocks than layers some hold none. What has no layer's number, such as
    the head, counts to the last block.

    Raises RunError naming (``names``) the adapter whose targets or shapes are not the first's; MoalignError for
    coefficients or scalings that are not finite, or nothing left to mix.
    """
    _check_coefficients(coefficients, len(adapters))
    if len(scalings) != len(adapters) or scaling == 0 or not all(map(math.isfinite, (scaling, *scalings))):
        raise MoalignError(
            f"scalings {list(scalings)} of {len(adapters)} adapters to {scaling}: one finite number each"
        )
    names = [f"adapter {k}" for k in range(len(adapters))] if names is None else names
    pairs = [factors(tensors, name) for tensors, name in zip(adapters, names, strict=True)]
    for other, name in zip(pairs, names, strict=True):
        _refuse_another_shape(pairs[0], names[0], other, name)
    # c (s_k / s) and not (c s_k) / s: between equal scalings c itself, without a rounding
    used = [each for each in zip(pairs, coefficients, scalings, strict=True) if any(_numbers(each[1]))]
    mixed, places = {}, _places(pairs[0])
    for layer in pairs[0]:
        factors_of = [_at(c, places[layer]) * (s / scaling) for _, c, s in used]
        mixed[layer + _A] = torch.cat([pair[layer][0] for pair, _, _ in used])
        mixed[layer + _B] = torch.cat(
            [pair[layer][1] * factor for (pair, _, _), factor in zip(used, factors_of, strict=True)], dim=1
        )
    return mixed


def compress(adapter: Mapping[str, Tensor], r: int) -> tuple[dict[str, Tensor], Truncation]:
    """The adapter of rank ``r`` whose every B A is nearest in the Frobenius norm, under the same scaling.

    The truncated SVD (Eckart & Young 1936), by QR of both factors and an SVD of the small core, in float64 and without
    ever forming [out, in]. Exact where the true rank is at most r; ranks above the true one are filled with zeros. The
    factors are balanced (A A^T = B^T B = the singular values), and the largest entry of each row of A is positive.
    The reported loss is the truncation's; rounding to the tensors' own precision comes on top.
    """
    compressed: dict[str, Tensor] = {}
    cut: dict[str, float] = {}
    whole: dict[str, float] = {}
    for layer, (a, b) in factors(adapter).items():
        small_a, small_b, values = _truncated(a.double(), b.double(), _checked_rank(r))
        compressed[layer + _A], compressed[layer + _B] = small_a.to(a.dtype), small_b.to(b.dtype)
        cut[layer], whole[layer] = float(values[r:].norm()), float(values.norm())
    lost = {layer: _ratio(cut[layer], whole[layer]) for layer in cut}
    return compressed, Truncation(lost, _ratio(math.hypot(*cut.values()), math.hypot(*whole.values())))


def _truncated(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A [r, in], B [out, r], all singular values of B A, largest first)."""
    right, core_a = torch.linalg.qr(a.T)  # A = core_a^T right^T
    left, core_b = torch.linalg.qr(b)
    u, values, vh = torch.linalg.svd(core_b @ core_a.T, full_matrices=False)
    kept = min(r, len(values))
    root = values[:kept].sqrt()
    small_a, small_b = root[:, None] * (vh[:kept] @ right.T), (left @ u[:, :kept]) * root
    largest = small_a.gather(1, small_a.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(a)
    small_a, small_b = small_a * signs, small_b * signs.T
    rows, columns = a.new_zeros(r - kept, a.shape[1]), b.new_zeros(len(b), r - kept)
    return torch.cat([small_a, rows]), torch.cat([small_b, columns], dim=1), values


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _checked_rank(r: int) -> int:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise MoalignError(f"rank {r!r}: an adapter has rank 1 at least, a whole number")
    return r


def _numbers(coefficient: Coefficient) -> tuple[float, ...]:
    return coefficient if isinstance(coefficient, tuple) else (coefficient,)


def _at(coefficient: Coefficient, place: tuple[int, int] | None) -> float:
    """That of the block in which a layer lies; ``place``: its rank from the bottom, and of how many. None: the last."""
    numbers = _numbers(coefficient)
    return numbers[-1] if place is None else numbers[place[0] * len(numbers) // place[1]]


def _places(names: Iterable[str]) -> dict[str, tuple[int, int] | None]:
    """Adapted module -> the rank of its layer among those adapted, from 0 at the bottom, and how many these are.

    A layer's number is the first in the module's name; None where there is none.
    """
    found = {name: re.search(r"\.(\d+)\.", name) for name in names}
    layers = {name: int(match[1]) for name, match in found.items() if match}
    order = sorted(set(layers.values()))
    return {name: (order.index(layers[name]), len(order)) if name in layers else None for name in found}


def _check_coefficients(coefficients: Sequence[Coefficient], adapters: int) -> None:
    numbers = [_numbers(coefficient) for coefficient in coefficients]
    if len(numbers) != adapters or not all(each and all(map(math.isfinite, each)) for each in numbers):
        raise MoalignError(
            f"coefficients {list(coefficients)} of {adapters} adapters: one finite number each is needed"
        )
    if not any(map(any, numbers)):
        raise MoalignError("no coefficient differs from 0: that mix is the base itself and needs no adapter")


def _refuse_another_shape(
    first: Mapping[str, tuple[Tensor, Tensor]], name: str, other: Mapping[str, tuple[Tensor, Tensor]], other_name: str
) -> None:
    """RunError naming both adapters and the first layer that only one has, or has in another size."""
    if first.keys() != other.keys():
        layer = min(first.keys() ^ other.keys())
        owner, lacking = (name, other_name) if layer in first else (other_name, name)
        raise RunError(f"{lacking}: does not adapt {layer}, {owner} does; only adapters of the same targets are mixed")
    for layer, (a, b) in first.items():
        size, found = (len(b), a.shape[1]), (len(other[layer][1]), other[layer][0].shape[1])
        if size != found:
            raise RunError(f"{other_name}: {layer} is {found[0]} x {found[1]}, in {name} it is {size[0]} x {size[1]}")

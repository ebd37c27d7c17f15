"""``posterior.safetensors``: mean and deviation of a candidate's weights, in the folder of its adapter.

It names the base model, and the adapter file beside it by checksum, so that it cannot pass for another candidate's.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from moalign import storage
from moalign.errors import CorruptFileError, RunError
from moalign.lora.adapters import WEIGHTS_FILE
from moalign.lora.posterior import Posterior

FILE = "posterior.safetensors"
_MEAN, _DEVIATION = "mean/", "deviation/"


def write(posterior: Posterior, directory: Path, base_fingerprint: str) -> None:
    """Beside the adapter that is already there; its tensors' names behind ``mean/`` and ``deviation/``, in float32."""
    tensors = {_MEAN + name: tensor.float() for name, tensor in posterior.mean.items()}
    tensors |= {_DEVIATION + name: tensor.float() for name, tensor in posterior.deviation.items()}
    metadata = {"base": base_fingerprint, "adapter": storage.sha256_of(directory / WEIGHTS_FILE)}
    storage.write_tensors(directory / FILE, tensors, metadata)


def read(directory: Path, shapes: dict[str, tuple[int, ...]], base_fingerprint: str) -> Posterior:
    """What ``write`` wrote for the adapter there, whose tensors have these shapes.

    Raises RunError where it is missing or belongs to another base model, CorruptFileError where it is damaged or
    belongs to another adapter.
    """
    file = directory / FILE
    metadata, tensors = storage.read_metadata(file), storage.read_tensors(file)
    if metadata.get("base") != base_fingerprint:
        raise RunError(f"{file}: this posterior was trained on another base model")
    if metadata.get("adapter") != storage.sha256_of(directory / WEIGHTS_FILE):
        raise CorruptFileError(f"{file}: not the posterior of the adapter beside it; restore it")
    mean, deviation = _part(tensors, _MEAN), _part(tensors, _DEVIATION)
    for part in (mean, deviation):
        if {name: tuple(tensor.shape) for name, tensor in part.items()} != shapes:
            raise CorruptFileError(f"{file}: its tensors are not those of the adapter beside it")
    sound = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    if len(tensors) != 2 * len(shapes) or not sound or any(bool((each < 0).any()) for each in deviation.values()):
        raise CorruptFileError(f"{file}: it holds more than means and deviations, or numbers that are none")
    return Posterior(mean, deviation)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

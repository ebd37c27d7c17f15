"""A directory that `moalign reward-model train` wrote: what its record says, and whether it is still what was written.

Nothing of moalign but its types is needed to read it: the record and the manifest are JSON, the base's fingerprint is
a sha256 over its tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign.api import ModelError

if TYPE_CHECKING:
    from torch import Tensor

RECORD, MANIFEST = "reward_model.json", "MANIFEST.json"
ADAPTER = "adapter/adapter_model.safetensors"


@dataclass(frozen=True)
class Written:
    """``form``: its name and options. ``base``: the fingerprint of the base that was trained on, in ``dtype``."""

    form: Mapping[str, Any]
    objectives: tuple[str, ...]
    members: tuple[str, ...]
    max_length: int
    end: int
    base: str
    base_directory: str
    dtype: str


def record_of(path: str) -> Written:
    """Raises ModelError where the record lacks something."""
    file = Path(path).expanduser() / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        members = tuple(sorted(record["members"], key=lambda name: int(name.rpartition("-")[2])))
        written = Written(
            form=dict(record["config"]["reward_model"]),
            objectives=tuple(record["objectives"]),
            members=members,
            max_length=int(record["config"]["data"]["max_length"]),
            end=int(record["end_token_id"]),
            base=_text(record["base"]),
            base_directory=_text(record["base_directory"]),
            dtype=_text(record["dtype"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: cannot be read as what training wrote: {error!r}") from error
    for name, listed in (("objectives", written.objectives), ("members", written.members)):
        if not listed:
            raise ModelError(f"{file}: it has no {name}; restore it, or train again")
    return written


def verify(path: str) -> None:
    """Compare sizes and checksums with MANIFEST.json. Raises ModelError naming the file that is not as written."""
    folder = Path(path).expanduser()
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / MANIFEST}: is missing or no manifest, so nothing vouches for {path}") from error
    named = {RECORD, *(f"{name}/{file}" for name in record_of(path).members for file in ("head.safetensors", ADAPTER))}
    if unnamed := sorted(named - set(expected)):
        raise ModelError(f"{folder / MANIFEST}: does not name {unnamed[0]}; restore the directory, or train again")
    for name, (size, checksum) in expected.items():
        file = folder / name
        if not file.is_file():
            raise ModelError(f"{file}: is missing; restore it, or train again")
        if file.stat().st_size != size or _sha256(file) != checksum:
            raise ModelError(f"{file}: its content is not what training wrote; restore it, or train again")


def fingerprint(model: Any) -> str:
    """sha256 over names, types and bytes of all weights of a base without adapters: ``base`` in the record."""
    import torch

    digest = hashlib.sha256()
    tensors: Mapping[str, Tensor] = model.state_dict()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_names(found: Mapping[str, Any], expected: Mapping[str, Any], where: Path) -> None:
    """Tensors of a file, and those that a model or a form has, by name and shape. Raises ModelError."""
    given, wanted = ({name: tuple(value.shape) for name, value in each.items()} for each in (found, expected))
    if given != wanted:
        name = sorted({name for name, _ in set(given.items()) ^ set(wanted.items())})[0]
        shapes = [list(each[name]) if name in each else "nothing" for each in (given, wanted)]
        raise ModelError(f"{where}: tensors do not fit, first at {name}: there is {shapes[0]}, expected {shapes[1]}")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

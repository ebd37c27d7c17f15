"""Adapter files that other programs wrote, without a checksum and without the base that they were trained on."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from moalign.errors import CorruptFileError


def names_base(path: Path) -> bool:
    """Whether its metadata say on which base it was trained. False for a file that cannot be read at all."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return "base" in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file, on the CPU. CorruptFileError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CorruptFileError(f"{path}: not a safetensors file: {error}") from error

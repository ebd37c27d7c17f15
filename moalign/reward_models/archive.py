"""A trained reward model's directory, read again. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moalign import storage
from moalign.errors import RunError

RECORD, REPORT = "reward_model.json", "report.json"


def read_record(directory: Path) -> dict[str, Any]:
    """Configuration, hashes and what was written. Raises RunError where there is none, CorruptFileError."""
    return _read(directory, RECORD)


def read_report(directory: Path) -> dict[str, Any]:
    """What training measured. Raises as ``read_record`` does."""
    _read(directory, RECORD)
    return _read(directory, REPORT)


def _read(directory: Path, name: str) -> dict[str, Any]:
    if not (directory / name).is_file():
        raise RunError(f"{directory}: no {name} in it; this is nothing that `moalign reward-model train` wrote")
    content: dict[str, Any] = storage.read_json(directory / name)
    return content

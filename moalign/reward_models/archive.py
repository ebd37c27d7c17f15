"""A trained reward model's directory, read again. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moalign import storage
from moalign.errors import CorruptFileError, RunError

RECORD, REPORT = "reward_model.json", "report.json"


def read_record(directory: Path) -> dict[str, Any]:
    """Configuration, hashes and what was written. Raises RunError where there is none, CorruptFileError."""
    _check_record(directory)
    return _read(directory, RECORD)


def read_report(directory: Path) -> dict[str, Any]:
    """What training measured, as it was written. Raises RunError where there is none, CorruptFileError."""
    _check_record(directory)
    unlisted = storage.verify(directory, (RECORD, REPORT))
    if not (directory / REPORT).is_file():
        why = read_record(directory).get("unmeasured", "the manifest names none")
        raise RunError(f"{directory}: a trained reward model without {REPORT}; it was not measured: {why}")
    if REPORT in unlisted:
        raise CorruptFileError(f"{directory / REPORT}: the manifest does not name it; it is not what training wrote")
    return _read(directory, REPORT)


def _check_record(directory: Path) -> None:
    if not (directory / RECORD).is_file():
        raise RunError(f"{directory}: no {RECORD} in it; this is nothing that `moalign reward-model train` wrote")


def check_vacant(out: Path) -> None:
    """Raises RunError where there is something already."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out} exists already; it is never overwritten: choose another --out, or delete it")


def _read(directory: Path, name: str) -> dict[str, Any]:
    content = storage.read_json(directory / name)
    if not isinstance(content, dict):
        raise CorruptFileError(f"{directory / name}: not the JSON that was written here")
    return content

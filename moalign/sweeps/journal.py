"""The append-only history of a run: one event per line, numbered and checksummed.

``{"checksum": sha256 of the rest, "event": {...}, "sequence": n}`` in canonical JSON, so each event has exactly one
valid line and any altered bit is seen. A process may die at any byte of an append: the unfinished last line is left
out by ``read`` and cut away by the next ``append``; every line before it stays.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moalign import storage
from moalign.errors import CorruptFileError, MoalignError, RunError

log = logging.getLogger(__name__)

FILE = "journal.jsonl"
ENDED = "ended"  # the event after which a search wants no more


class _Content(NamedTuple):
    events: list[dict[str, Any]]
    end: int  # bytes that belong to whole lines
    torn: bytes  # what follows them


def append(path: str | Path, event: Mapping[str, Any]) -> int:
    """Add one event durably and return its sequence number (from 1). Only under the run's lock.

    Raises CorruptFileError as ``read`` does, RunError when the disk refuses (the journal is then as it was before).
    """
    content = _read(Path(path))
    sequence = len(content.events) + 1
    try:
        line = _line(sequence, dict(event))
    except (TypeError, ValueError, RecursionError) as error:
        raise MoalignError(f"{path}: an event cannot be written as JSON: {error}") from error
    if content.torn.endswith(b"\n"):  # whole yet wrong: perhaps a flipped bit, so keep it where somebody can look
        storage.write_bytes(f"{path}.damaged-{content.end}", content.torn)
    storage.append_bytes(path, line, keep=content.end)
    return sequence


def read(path: str | Path) -> list[dict[str, Any]]:
    """All events in order; none when there is no file. An unfinished last line is left out with a warning.

    Raises CorruptFileError naming file and line where any earlier line is not what was written, or one is missing.
    """
    return _read(Path(path)).events


def of_run(run_directory: Path) -> list[dict[str, Any]]:
    """``read`` of a run directory. Raises RunError where the journal is gone and candidates are not."""
    path = run_directory / FILE
    if not path.exists() and any((run_directory / "candidates").glob("[!.]*")):
        raise RunError(f"{path} is gone, though candidates were finished; restore it from a copy")
    return read(path)


def ended(path: str | Path) -> bool:
    """Whether the run is finished."""
    return any(event["event"] == ENDED for event in read(path))


def torn(path: str | Path) -> int:
    """Number of bytes at the end that belong to no whole line: 0 in a journal whose last append finished."""
    return len(_read(Path(path)).torn)


def _read(path: Path) -> _Content:
    if not path.exists():
        return _Content([], 0, b"")
    *whole, tail = storage.read_bytes(path).split(b"\n")
    lines = [line + b"\n" for line in whole] + ([tail] if tail else [])
    events: list[dict[str, Any]] = []
    end = 0
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None and number == len(lines):
            log.warning("%s:%d: the last line is unfinished or damaged and was left out", path, number)
            return _Content(events, end, line)
        if record is None:
            raise CorruptFileError(f"{path}:{number}: this line is not what was written; restore it from a copy")
        sequence, event = record
        if sequence != number:
            raise CorruptFileError(f"{path}:{number}: event {sequence} stands where event {number} belongs")
        events.append(event)
        end += len(line)
    return _Content(events, end, b"")


def _record(line: bytes) -> tuple[int, dict[str, Any]] | None:
    """Number and event of a line, or None unless the line is exactly what ``_line`` makes of them."""
    try:
        record = storage.parse_json(line)
        sequence, event = record["sequence"], record["event"]
        return (sequence, event) if isinstance(event, dict) and _line(sequence, event) == line else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _line(sequence: int, event: dict[str, Any]) -> bytes:
    checksum = hashlib.sha256(_compact([sequence, event])).hexdigest()
    return _compact({"checksum": checksum, "event": event, "sequence": sequence}) + b"\n"


def _compact(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

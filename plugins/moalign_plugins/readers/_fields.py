"""What readers share of single values: missing ones, numbers, truth values and lists, which CSV has as text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from moalign.api import Pair, Record, Refusal, Row

SPREAD = (10.0, 90.0)  # where the ends of a rating's scale go when ratings of several datasets are trained on together


def records(rows: Iterable[Row], record: Callable[[Mapping[str, Any], str, int], Record]) -> Iterator[Record | Refusal]:
    """What ``record`` makes of each row, or a refusal with the reason of the ValueError that it raised."""
    for file, line, row in rows:
        try:
            yield record(row, file, line)
        except ValueError as reason:
            yield Refusal(file, line, str(reason))


def is_missing(value: Any) -> bool:
    """None, empty text and "N/A"."""
    return value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a"))


def number(value: Any, column: str, least: float = -math.inf, most: float = math.inf) -> float | None:
    """The number, or None where there is none. Raises ValueError for anything else, and outside ``least`` to ``most``.

    Text that is a number is one; true and false are not.
    """
    if is_missing(value):
        return None
    try:
        found = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"not a finite number: column {column!r} has {str(value)[:40]!r}")
    if not least <= found <= most:
        raise ValueError(f"a number out of its range: column {column!r} has {found:g}, not from {least:g} to {most:g}")
    return found


def index(value: Any, column: str, responses: int) -> int | None:
    """The index of a response, from 0, or None where it is missing. Raises ValueError for anything else."""
    found = number(value, column)
    if found is None:
        return None
    if not found.is_integer() or not 0 <= found < responses:
        raise ValueError(f"column {column!r} does not name one of the responses: {str(value)[:40]!r}")
    return int(found)


def truth(value: Any, column: str) -> bool | None:
    """True or false, also as 1, 0 or text; None where it is missing. Raises ValueError for anything else."""
    if is_missing(value):
        return None
    found = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if isinstance(value, bool | int | float | str) and str(value).strip().lower() in found:
        return found[str(value).strip().lower()]
    raise ValueError(f"neither true nor false: column {column!r} has {str(value)[:40]!r}")


def text(row: Any, column: str) -> str:
    """Raises ValueError where the column is missing or holds something else."""
    value = row.get(column) if isinstance(row, Mapping) else None
    if not isinstance(value, str):
        raise ValueError(f"no text in column {column!r}")
    return value


def entries(row: Mapping[str, Any], column: str) -> list[Any]:
    """A list, also as the JSON text that it is in a table. Raises ValueError for anything else."""
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"a list in a table has to be JSON: column {column!r}") from None
    if not isinstance(value, list):
        raise ValueError(f"no list in column {column!r}")
    return value


def signed(value: float, first: int = 0, second: int = 1) -> Pair:
    """A judgement of two responses as one number: negative, the first is better; positive, the second; 0, a tie."""
    return Pair(first, second, strength=abs(value)) if value <= 0 else Pair(second, first, strength=value)


def spread(value: float | None, least: float, most: float) -> float | None:
    """The affine map of a scale onto ``SPREAD``: ``20 s + 10`` for 0 to 4, as DPA has it (arXiv:2402.18571)."""
    if value is None:
        return None
    low, high = SPREAD
    return low + (high - low) * (value - least) / (most - least)

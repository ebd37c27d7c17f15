"""A data file -> rows: (file, line, columns). Anything that is not well formed stops here, named by file and line.

Lines are counted from 1. For a JSON array the "line" is the number of the element, for Parquet that of the row.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moalign.data import strict_json
from moalign.errors import DataError

Row = tuple[str, int, Mapping[str, Any]]

LINE_LIMIT = 100_000_000  # bytes of one line; a longer one is refused without being read to its end
JSON_LIMIT = 2_000_000_000  # bytes of one .json file, which has to be read whole


def read_rows(path: str | Path) -> Iterator[Row]:
    """Rows of a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, each with its file and line.

    Raises DataError with file and line: at once for a path that cannot be read, while iterating for a bad row.
    """
    path = Path(path)
    _check_path(path)
    return _rows(path, _PARSERS[path.suffix.lower()])


def _rows(path: Path, parse: Callable[[Path], Iterator[tuple[int, Any]]]) -> Iterator[Row]:
    line = 0
    try:
        for line, row in parse(path):
            if not isinstance(row, dict):
                raise DataError(f"a row must be an object, not {_kind(row)}", file=str(path), line=line)
            yield str(path), line, row
    except OSError as error:
        raise DataError(f"cannot be read: {error}", file=str(path), line=line + 1) from None
    if line == 0:
        raise DataError("the file holds no rows", file=str(path), line=1)


def _check_path(path: Path) -> None:
    suffixes = ", ".join(_PARSERS)
    try:
        if path.is_dir():
            inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in _PARSERS)
            hint = f"name a file in it, such as {inside[0]}" if inside else f"it holds no {suffixes} file"
            raise DataError(f"is a directory; {hint}", file=str(path))
        if not path.exists():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            close = difflib.get_close_matches(path.name, siblings, n=1)
            hint = f"; did you mean '{path.parent / close[0]}'?" if close else ""
            raise DataError(f"no such file{hint}", file=str(path))
    except (OSError, ValueError) as error:  # a name too long, a NUL in it, no permission
        raise DataError(f"cannot be read: {error}", file=str(path)) from None
    if not path.is_file():
        raise DataError("is not a regular file", file=str(path))
    if path.suffix.lower() not in _PARSERS:
        raise DataError(f"unknown file type '{path.suffix}'; known: {suffixes}", file=str(path))


def _lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Number, text, and whether the line ends with a line break."""
    with path.open("rb") as handle:
        number = 0
        while raw := handle.readline(LINE_LIMIT + 1):
            number += 1
            yield number, _decode(raw, path, number), raw.endswith(b"\n")


def _decode(raw: bytes, path: Path, number: int) -> str:
    if len(raw) > LINE_LIMIT:
        raise DataError(f"the line is longer than {LINE_LIMIT:,} bytes", file=str(path), line=number)
    if number == 1:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError("the file is UTF-16; save it as UTF-8", file=str(path), line=1)
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in raw:
        raise DataError(f"NUL byte at byte {raw.index(0) + 1} of the line", file=str(path), line=number)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise DataError(reason, file=str(path), line=number) from None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, text, ended in _lines(path):
        if not text.strip():
            continue
        try:
            yield number, strict_json.parse(text)
        except strict_json.JsonFault as fault:
            cut = "" if ended else "; this is the last line and has no line end: was the file cut off?"
            raise DataError(fault.reason + cut, file=str(path), line=number) from None


def _json_array(path: Path) -> Iterator[tuple[int, Any]]:
    if path.stat().st_size > JSON_LIMIT:
        raise DataError(f"larger than {JSON_LIMIT:,} bytes; convert it to .jsonl", file=str(path), line=1)
    text = "".join(text for _, text, _ in _lines(path))
    if not text.strip():
        return
    try:
        yield from strict_json.elements(text)
    except strict_json.JsonFault as fault:
        raise DataError(fault.reason, file=str(path), line=fault.element) from None


def _table(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))  # Python's own 128 kB is less than a long prompt
    reader = csv.reader((text for _, text, _ in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"malformed table: {error}", file=str(path), line=start) from None
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            _check_header(header, path, start)
        elif len(cells) != len(header):
            reason = f"the row has {len(cells)} fields, the header {len(header)}"
            raise DataError(reason, file=str(path), line=start)
        else:
            yield start, dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            _check_header(table.schema_arrow.names, path, 1)
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"not a readable Parquet file: {reason}", file=str(path), line=number + 1) from None


def _check_header(names: list[str], path: Path, line: int) -> None:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"two columns are called {repeated!r}", file=str(path), line=line)
    if any(not name.strip() for name in names):
        raise DataError("a column has no name", file=str(path), line=line)


def _kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


_PARSERS: Mapping[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": lambda path: _table(path, ","),
    ".tsv": lambda path: _table(path, "\t"),
    ".parquet": _parquet,
}

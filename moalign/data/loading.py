"""Runs a reader over a file and lets nothing pass that is not a sound record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moalign import door
from moalign.api import Reader
from moalign.data.records import fault_of, prompt_key
from moalign.data.rows import Row, read_rows
from moalign.errors import DataError, PluginError, UserError
from moalign.types import Record, Refusal


@dataclass(frozen=True)
class Loaded:
    """What a file held: the sound records, and a refusal for everything else."""

    records: tuple[Record, ...]
    refusals: tuple[Refusal, ...]


def read_file(path: str, readers: Mapping[str, Reader], objectives: Sequence[str], malformed: str = "error") -> Loaded:
    """Records of a file through the one reader, or, of several, through the one that recognises its first row.

    ``malformed`` "error": raises DataError at the first refused row; "skip": the refusals are returned, to be reported.
    """
    loaded = load_records(path, reader_of(path, readers), objectives)
    if loaded.refusals and malformed == "error":
        first_refusal = loaded.refusals[0]
        more = f" ({len(loaded.refusals)} rows in all)" if len(loaded.refusals) > 1 else ""
        raise DataError(
            f"{first_refusal.reason}{more}; mend the file, or count and skip such rows with data.malformed=skip",
            file=first_refusal.file,
            line=first_refusal.line,
        )
    return loaded


def reader_of(path: str, readers: Mapping[str, Reader]) -> Reader:
    """The one reader, or, of several, the one that recognises the first row of the file."""
    if len(readers) == 1:
        return next(iter(readers.values()))
    first = next(iter(read_rows(path)), None)
    if first is None:
        raise DataError("the file holds no rows", file=path)
    return readers[choose_reader(first, readers)]


def load_records(
    path: str | Path, reader: Reader, objectives: Sequence[str] = (), *, allow_none: bool = False
) -> Loaded:
    """Read a whole file. ``objectives``: names to read for; empty: whatever the file offers.

    Raises DataError (file and line) for a malformed file, and where not one record is left unless ``allow_none``;
    PluginError where the reader itself fails.
    """
    records: list[Record] = []
    refusals: list[Refusal] = []
    for item in read_records(read_rows(path), reader, objectives):
        if isinstance(item, Record):
            records.append(item)
        else:
            refusals.append(item)
    if not records and not allow_none:
        if not refusals:
            raise DataError(f"the reader {_name(reader)} took no row of this file", file=str(path), line=1)
        first = refusals[0]
        reason = f"all {len(refusals)} rows or judgements were refused, the first because: {first.reason}"
        raise DataError(reason, file=first.file, line=first.line)
    return Loaded(tuple(records), tuple(refusals))


def read_records(rows: Iterable[Row], reader: Reader, objectives: Sequence[str]) -> Iterator[Record | Refusal]:
    """Sound records and refusals in the order of the file; a record without a group is its prompt's."""
    place: list[Any] = ["", 0]

    def followed() -> Iterator[Row]:
        for row in rows:
            place[:] = row[:2]
            yield row

    try:
        for item in door.iterate(reader, "read", followed(), objectives):
            yield item if isinstance(item, Refusal) else _sound(item, objectives, reader)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit and what a stranger may derive from BaseException
        raise door.as_plugin_error(error, door.origin(reader), f"read at {place[0]}:{place[1]}") from error


def choose_reader(row: Row, readers: Mapping[str, Reader]) -> str:
    """The name of the one reader that recognises the first row of a file; those of one format go before general ones.

    Raises DataError where none or several do.
    """
    file, line, columns = row
    names, failures = [], []
    for name, reader in readers.items():
        try:
            if door.call(reader, "recognises", deepcopy(columns), then=bool):
                names.append(name)
        except (PluginError, UserError) as error:  # one that nobody asked for must not keep the others from their work
            failures.append(f"; {error}")
    names = [name for name in names if not readers[name].general] or names
    if len(names) == 1:
        return names[0]
    shown = ", ".join(map(repr, list(columns)[:20]))
    if names:
        reason = f"several readers recognise these columns ({', '.join(names)}); set data.reader to one of them"
    else:
        known = ", ".join(readers)
        more = "one that takes options (`moalign plugins list --kind reader`)"
        reason = f"no reader recognises the columns {shown}; set data.reader to one of {known}, or to {more}"
        reason += "".join(failures)
    raise DataError(reason, file=file, line=line)


def _sound(record: Any, objectives: Sequence[str], reader: Reader) -> Record | Refusal:
    if not isinstance(record, Record):
        raise TypeError(f"it yielded {type(record).__name__}, neither Record nor Refusal")
    fault = fault_of(record, objectives)
    if fault is not None:
        source = f"from {door.origin(reader).who}, in read"
        return Refusal(record.file, record.line, f"{fault} ({source})" if ": " in fault else f"{fault}: {source}")
    return record if record.group else replace(record, group=str(prompt_key(record.prompt)))


def _name(reader: Reader) -> str:
    return type(reader).__name__

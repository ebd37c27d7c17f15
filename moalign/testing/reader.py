"""Whether a reader of a dataset format keeps to the contract of ``moalign.api.Reader``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any

from moalign.api import DataError, Reader, Record, Refusal, Row
from moalign.data.records import fault_of
from moalign.testing.review import Review, described, run, short

FILE = "rows.jsonl"
MANY = 1000  # rows of the stream that must not be read to its end before the first record
MOST_PLACES = 60  # of a row, at which hostile values are put
HOSTILE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    7,
    0.5,
    float("nan"),
    float("inf"),
    10**400,
    "",
    " ",
    "tie",
    "1e999",
    "nan",
    "\0",
    "\ud800",
    "x" * 200_000,
    [],
    [None],
    [[]],
    [{}],
    [1, "two", None],
    [{"role": None, "content": None}],
    [{"role": "user", "content": ["text"]}],
    {},
    {"a": {"b": [{"c": None}]}},
    b"bytes",
)


def check_reader(
    plugin: Reader,
    rows: Sequence[Mapping[str, Any]],
    *,
    objectives: Sequence[str] = (),
    exempt: Collection[str] = (),
) -> None:
    """Check a reader on ``rows``, which are right, and on rows made from them that are wrong in one place.

    ``objectives``: the names of the configuration; empty: whatever the rows offer. ``exempt``: names of checks to
    leave out. Raises ConformanceError, and ValueError without rows.
    """
    if not rows:
        raise ValueError("rows: give at least one row that the reader takes")
    run(CHECKS, Trial(Review("reader", plugin), plugin, tuple(rows), tuple(objectives)), exempt)


@dataclass(frozen=True)
class Trial:
    review: Review
    plugin: Reader
    rows: tuple[Mapping[str, Any], ...]
    objectives: tuple[str, ...]

    def read(self, tried: str, columns: Sequence[Mapping[str, Any]]) -> list[Record | Refusal]:
        """All that comes of these rows, checked: known types, a known place, no row forgotten or changed."""
        given = deepcopy(list(columns))
        rows = [(FILE, number, row) for number, row in enumerate(given, 1)]
        change = "yield a Refusal with the reason for a row that cannot be taken; rows may hold anything"
        read = self.plugin.read
        items = self.review.call(tried, change, lambda: list(read(iter(rows), self.objectives)))
        change = "copy what is to be changed: a row may be shown to another reader"
        self.review.require(repr(given) == repr(list(columns)), tried, "the rows were changed during the call", change)
        for item in items:
            good = isinstance(item, Record | Refusal)
            self.review.require(good, tried, short(item), "yield moalign.api.Record and moalign.api.Refusal only")
        places = {(item.file, item.line) for item in items}
        known = {(file, number) for file, number, _ in rows}
        change = "give every Record and Refusal the file and line of its row"
        self.review.require(places <= known, tried, f"the places {sorted(places - known)[:3]}", change)
        forgotten = [number for file, number, _ in rows if (file, number) not in places]
        change = "drop nothing silently: yield a Refusal, with the reason, for every row without a Record"
        got = (
            f"neither record nor refusal for {FILE}:{forgotten[0]}, {short(columns[forgotten[0] - 1])}"
            if forgotten
            else ""
        )
        self.review.require(not forgotten, tried, got, change)
        for item in items:
            reason = item.reason if isinstance(item, Refusal) else "none"
            change = "say in the refusal what is wrong"
            self.review.require(isinstance(reason, str) and bool(reason.strip()), tried, f"{reason!r}", change)
        return items

    def hostile(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row with one place taken away, or filled with what does not belong there."""
        yield "a row without columns", {}
        yield "a row with None in every column", dict.fromkeys(self.rows[0])
        for row in self.rows[:2]:
            for path in islice(_paths(row), MOST_PLACES):
                place = "".join(f"[{key!r}]" for key in path)
                yield f"a row without {place}", _replaced(row, path, None, remove=True)
                for value in HOSTILE:
                    yield f"a row with {short(value)} at {place}", _replaced(row, path, value)
            yield "a row with a column more", {**row, "moalign-extra": [None]}


def right_rows_are_taken(t: Trial) -> None:
    """Sound records, of the given rows alone and of no rows nothing."""
    tried = f"the {len(t.rows)} rows that were given as right"
    try:
        items = t.read(tried, t.rows)
        t.review.require(t.read("no rows", []) == [], "no rows", "something", "yield nothing")
    except DataError as error:
        t.review.fail(tried, described(error), "take rows of the format; or mend the rows given to this check", error)
    records = [item for item in items if isinstance(item, Record)]
    refused = [item.reason for item in items if isinstance(item, Refusal)]
    change = "take rows of the format; or mend the rows given to this check"
    reason = refused[0] if refused else "nothing was yielded"
    t.review.require(bool(records), tried, f"no record; refused because: {reason}", change)
    for record in records:
        fault = fault_of(record, t.objectives)
        change = "yield records as moalign.api.Record describes them"
        t.review.require(fault is None, tried, f"a record that cannot be used: {fault}", change)


def same_twice(t: Trial) -> None:
    change = "read without chance and without memory of what was read before"
    first, second = t.read("the rows", t.rows), t.read("the rows again", t.rows)
    t.review.require(first == second, "the same rows twice", "other records", change)


def rows_are_read_lazily(t: Trial) -> None:
    """The first record comes long before the last row: files are larger than memory."""
    taken = 0

    def counted() -> Iterator[Row]:
        nonlocal taken
        for taken in range(1, MANY + 1):
            yield FILE, taken, dict(t.rows[taken % len(t.rows)])

    tried = f"the first record of {MANY} rows"
    found = t.review.call(tried, "make read a generator", lambda: next(iter(t.plugin.read(counted(), t.objectives))))
    change = "make read a generator that yields as it goes, instead of a list at the end"
    t.review.require(taken < MANY, tried, f"{type(found).__name__} after all {taken} rows were read", change)


def hostile_rows_are_refused(t: Trial) -> None:
    """Between right rows, each wrong one gives records, refusals, or a DataError with file and line; nothing else."""
    for tried, wrong in t.hostile():
        try:
            t.read(tried, [t.rows[0], wrong, t.rows[-1]])
        except DataError as error:
            placed = error.file == FILE and error.line is not None
            change = "pass file= and line= to DataError"
            t.review.require(placed, tried, f"a DataError without a place: {error}", change)


def recognises_answers(t: Trial) -> None:
    """True or False for the first row of any file."""
    for tried, row in [("a right row", dict(t.rows[0])), *t.hostile()]:
        given = deepcopy(row)
        change = "answer from the names of the columns; every reader is asked about every file"
        found = t.review.call(f"recognises() of {tried}", change, t.plugin.recognises, given)
        change = "return True or False"
        t.review.require(isinstance(found, bool), f"recognises() of {tried}", short(found), change)
        change = "change nothing in the row; other readers are asked about it next"
        t.review.require(repr(given) == repr(row), f"recognises() of {tried}", "the row was changed", change)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    right_rows_are_taken,
    same_twice,
    rows_are_read_lazily,
    hostile_rows_are_refused,
    recognises_answers,
)


def _paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys and indices that lead to each part of a row, outer parts first; of a list, to its first and last entry."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = [(index, value[index]) for index in sorted({0, len(value) - 1}) if value]
    for key, _ in inner:
        yield (*before, key)
    for key, part in inner:
        yield from _paths(part, (*before, key))


def _replaced(row: Mapping[str, Any], path: tuple[Any, ...], value: Any, *, remove: bool = False) -> dict[str, Any]:
    """A copy of the row with ``value`` at the place that ``path`` leads to, or without that place."""
    copy = deepcopy(dict(row))
    part: Any = copy
    for key in path[:-1]:
        part = part[key]
    if remove:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return copy

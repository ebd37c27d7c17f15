"""Any table, with a map from its columns to prompt, responses, scores and judgements.

A score is a number, or text that is one; empty text, "N/A" and null mean that it is not known. For example
``{responses: [answer], scores: {helpful: usefulness, short: brevity}}``
``{responses: [a, b], better: {helpful: more_helpful, safe: safer}}``
``{prompt: context, responses: [a, b], strength: {helpful: overall}}``
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from moalign.api import DataError, Message, Pair, Reader, Record, Refusal, Row
from moalign_plugins.readers._fields import index, is_missing, number, signed

REGISTRATION = {
    "name": "columns",
    "class": "Columns",
    "summary": "any table, with a map from columns to prompt, responses, scores",
}

Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class Columns(Reader):
    """The map.

    ``prompt``     the column of the prompt: text, or a list of messages
    ``responses``  one column per response, or one column that holds a list of them
    ``scores``     objective -> a column per response, or one column with a number or a list of numbers
    ``better``     objective -> the column that says which response is better: its index (from 0), the name of its
                   column, or "tie"; it is taken as better than every other response of the row
    ``strength``   objective -> the column with a signed judgement of two responses: negative, the first is better;
                   positive, the second; 0, a tie
    ``group``      the column whose value must not stand on both sides of the held-out split; else the prompt
    """

    general: ClassVar[bool] = True

    prompt: str = "prompt"
    responses: Names = Field(("response",), min_length=1)
    scores: dict[str, Names] = Field(default_factory=dict)
    better: dict[str, str] = Field(default_factory=dict)
    strength: dict[str, str] = Field(default_factory=dict)
    group: str | None = None

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return {self.prompt, *self.responses} <= row.keys()

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        mapped = {self.prompt, *self.responses, *self.better.values(), *self.strength.values()}
        mapped.update(column for columns in self.scores.values() for column in columns)
        mapped.update([self.group] if self.group is not None else [])
        place: tuple[str, int] | None = None
        known: set[str] = set()
        for file, line, row in rows:
            if place is None:
                place = (file, line)
                self._check_names(objectives, file, line)
            known |= row.keys()
            try:
                yield self._record(row, file, line)
            except ValueError as reason:
                yield Refusal(file, line, str(reason))
        missing = sorted(mapped - known)
        if missing and place is not None:
            close = difflib.get_close_matches(missing[0], known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known)[:20])}"
            raise DataError(f"no row has a column {missing[0]!r}; {hint}", file=place[0], line=place[1])

    def _check_names(self, objectives: Sequence[str], file: str, line: int) -> None:
        for name in (*self.scores, *self.better, *self.strength):
            if objectives and name not in objectives:
                close = difflib.get_close_matches(name, objectives, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(objectives))}"
                raise DataError(f"the reader's map names '{name}', which is no objective; {hint}", file=file, line=line)

    def _record(self, row: Mapping[str, Any], file: str, line: int) -> Record:
        responses = self._responses(row)
        pairs: dict[str, list[Pair]] = {}
        for name, column in self.better.items():
            pairs.setdefault(name, []).extend(self._better(row.get(column), column, len(responses)))
        for name, column in self.strength.items():
            pairs.setdefault(name, []).extend(_signed(row.get(column), column, len(responses)))
        prompt = _prompt(row, self.prompt)
        group = prompt if self.group is None else row.get(self.group)
        return Record(
            prompt=prompt,
            responses=responses,
            scores={name: _scores(row, columns, len(responses)) for name, columns in self.scores.items()},
            pairs={name: tuple(found) for name, found in pairs.items() if found},
            group=group if isinstance(group, str) else json.dumps(group, sort_keys=True, default=str),
            file=file,
            line=line,
        )

    def _responses(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        values: list[Any] = []
        for column in self.responses:
            value = row.get(column)
            if value is None:
                raise ValueError(f"no response in column {column!r}")
            values.extend(value if isinstance(value, list) and len(self.responses) == 1 else [value])
        if not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"a response is not text: columns {', '.join(self.responses)}")
        return tuple(values)

    def _better(self, value: Any, column: str, responses: int) -> list[Pair]:
        if isinstance(value, str) and value.strip().lower() == "tie":
            return [Pair(0, other, strength=0.0) for other in range(1, responses)]
        if isinstance(value, str) and value in self.responses and len(self.responses) > 1:
            value = self.responses.index(value)
        best = index(value, column, responses)
        return [] if best is None else [Pair(best, other) for other in range(responses) if other != best]


def _prompt(row: Mapping[str, Any], column: str) -> str | tuple[Message, ...]:
    value = row.get(column)
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return tuple({key: text for key, text in message.items() if text is not None} for message in value)
    if not isinstance(value, str):
        raise ValueError(f"no prompt in column {column!r}")
    return value


def _scores(row: Mapping[str, Any], columns: Sequence[str], responses: int) -> tuple[float | None, ...]:
    values = [row.get(column) for column in columns]
    if len(columns) == 1 and isinstance(values[0], list):
        values = values[0]
    elif len(columns) == 1 and is_missing(values[0]):
        values = [None] * responses
    if len(values) != responses:
        raise ValueError(f"number of scores differs from number of responses: {', '.join(columns)}")
    return tuple(number(value, columns[0]) for value in values)


def _signed(value: Any, column: str, responses: int) -> list[Pair]:
    strength = number(value, column)
    if strength is None:
        return []
    if responses != 2:
        raise ValueError(f"a signed strength needs exactly two responses: column {column!r}, {responses} responses")
    return [signed(strength)]

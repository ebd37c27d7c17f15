"""JSON as RFC 8259 has it, nothing guessed: no duplicate keys, no NaN, no lone surrogates, no numbers out of range.

Every fault is a ValueError whose text names it. ``elements`` walks an array one element at a time, so that a fault in
a file that is one long line can still be placed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Iterator
from typing import Any

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonFault(ValueError):
    """``reason`` says what is wrong, ``element`` (from 1) in which element of the array."""

    def __init__(self, reason: str, element: int = 1):
        super().__init__(reason)
        self.reason, self.element = reason, element


def parse(text: str) -> Any:
    """The value of a text that holds one JSON value. Raises JsonFault."""
    value, end = _value(text, _skip(text, 0))
    if _skip(text, end) != len(text):
        raise JsonFault(f"malformed JSON: text after the end of the value, at column {_skip(text, end) + 1}")
    return value


def elements(text: str) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of every element of a top-level array, or of the array under ``"data"``.

    Raises JsonFault with the number of the element.
    """
    start = _skip(text, 0)
    opening = text[start : start + 1]
    if opening == "[":
        end = yield from _array(text, start)
    elif opening == "{":
        end = yield from _object_with_data(text, start)
    else:
        raise JsonFault('the file must hold an array of objects, or an object with such an array under "data"')
    end = _skip(text, end)
    if end == len(text):
        return
    if opening == "{":
        raise JsonFault("text after the end of the object: if the file holds one object per line, call it .jsonl")
    raise JsonFault("text after the end of the array")


def _array(text: str, start: int) -> Generator[tuple[int, Any], None, int]:
    """Walk the array that opens at ``start``; returns the position after it."""
    at, number = _skip(text, start + 1), 0
    if text[at : at + 1] == "]":
        return at + 1
    while True:
        number += 1
        try:
            value, end = _value(text, at)
        except JsonFault as fault:
            raise JsonFault(fault.reason, number) from None
        yield number, value
        end = _skip(text, end)
        if text[end : end + 1] == "]":
            return end + 1
        _expect(text, end, ",", number)
        at = _skip(text, end + 1)


def _object_with_data(text: str, start: int) -> Generator[tuple[int, Any], None, int]:
    """Walk the object that opens at ``start`` and the array under its key "data"; returns the position after it."""
    keys: set[str] = set()
    at = end = _skip(text, start + 1)
    while text[at : at + 1] != "}" or keys:
        key, end = _value(text, at)
        if not isinstance(key, str):
            raise JsonFault("malformed JSON: a key must be a string")
        if key in keys:
            raise JsonFault(f"duplicate key: {key!r}")
        keys.add(key)
        end = _skip(text, end)
        _expect(text, end, ":", 1)
        at = _skip(text, end + 1)
        if key == "data" and text[at : at + 1] == "[":
            end = yield from _array(text, at)
        else:
            _, end = _value(text, at)
        end = _skip(text, end)
        if text[end : end + 1] == "}":
            break
        _expect(text, end, ",", 1)
        at = _skip(text, end + 1)
    if "data" not in keys:
        raise JsonFault(
            'an object without "data": the file must hold an array of objects, or such an array under "data"; '
            "if the file holds one object per line, call it .jsonl"
        )
    return end + 1


def _value(text: str, at: int) -> tuple[Any, int]:
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            raise JsonFault("malformed JSON: the text is cut off") from None
        line = f"line {error.lineno} of the file, " if error.lineno > 1 else ""
        raise JsonFault(f"malformed JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise JsonFault("nested too deeply") from None
    except JsonFault:
        raise
    except ValueError as error:  # an integer of more digits than Python takes
        raise JsonFault(f"number out of range: {error}") from None
    if _SURROGATE_ESCAPE.search(text, at, end):
        _refuse_lone_surrogates(value)
    return value, end


def _refuse_lone_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(error.object[error.start]):04x}"
        raise JsonFault(f"lone surrogate: {escape} is half a character; repair the text") from None


def _expect(text: str, at: int, sign: str, element: int) -> None:
    if at >= len(text):
        raise JsonFault("malformed JSON: the text is cut off", element)
    if text[at] != sign:
        raise JsonFault(f"malformed JSON: expected '{sign}' after this element, found {text[at]!r}", element)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise JsonFault(f"duplicate key: {repeated!r}")
    return found


def _constant(name: str) -> None:
    raise JsonFault(f"not a JSON number: {name}; write null where a number is missing")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonFault(f"number out of range: {text[:40]}")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)

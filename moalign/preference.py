"""Reading preferences: everything that a configuration or a command line may say, into ``moalign.types.Preference``.

========================================  ==============================================================
``{helpful: 0.7, harmless: 0.3}``         weights: not negative, sum 1; numbers or fractions such as "1/3"
``"helpful=0.7, harmless=0.3"``           the same in one line
``{direction: {helpful: 0.8, ...}}``      a vector of length 1; components may be negative
``{angle: 30}``                           two objectives: (cos, sin) of degrees (DPA, arXiv 2402.18571)
``"harmless>=0.8"``                       thresholds; the other objectives are maximised
``{thresholds: {harmless: 0.8}}``         the same
``"equal"``, ``"helpful"``, ``"mine"``    equal weights, all weight on one objective, a preset of the user
========================================  ==============================================================

An objective that is left out gets 0, and only where the numbers that are written already add up without it:
``{helpful: 0.7}`` is refused. Nothing is renormalised; what was written is what is used.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

from moalign.errors import PreferenceError
from moalign.types import Preference

EQUAL = "equal"  # the preset that gives all objectives the same weight

TOLERANCE = 1e-6  # how far a sum of weights, or the length of a direction, may be from 1

_WRAPPERS = ("weights", "direction", "thresholds", "angle")
_ITEM = re.compile(r"(?P<name>[^=<>]*?)\s*(?P<sign>>=|<=|=|>|<)\s*(?P<number>[^=<>]*)")


def parse(
    value: object,
    objectives: tuple[str, ...],
    named: Mapping[str, Preference] | None = None,
    where: str = "preference",
) -> Preference:
    """Any of the forms above -> Preference over ``objectives``, its values in their order.

    ``named`` are the user's presets, ``where`` the key that an error names. Raises PreferenceError with the reason.
    """
    if not objectives:
        raise PreferenceError(f"{where}: there are no objectives to prefer")
    if isinstance(value, Preference):
        return _validated(value.kind, value.values, objectives, where, value.name)
    if isinstance(value, str):
        return _parse_text(value.strip(), objectives, named or {}, where)
    if isinstance(value, Mapping):
        return _parse_mapping(value, objectives, where)
    raise PreferenceError(f"{where}: {value!r} is neither a name nor a mapping of objectives to numbers")


def to_json(preference: Preference) -> dict[str, Any]:
    """``{"kind", "values", "name"}``; ``from_json`` gives back an equal preference."""
    return {"kind": preference.kind, "values": dict(preference.values), "name": preference.name}


def from_json(value: object, objectives: tuple[str, ...], where: str = "preference") -> Preference:
    """What ``to_json`` wrote, checked against ``objectives``. Raises PreferenceError."""
    if not isinstance(value, Mapping) or set(value) != {"kind", "values", "name"}:
        raise PreferenceError(f"{where}: expected an object with the keys kind, values and name")
    kind, values, name = value["kind"], value["values"], value["name"]
    if kind not in ("weights", "direction", "thresholds") or not isinstance(values, Mapping):
        raise PreferenceError(f"{where}: kind {kind!r} with values {values!r} is not a preference")
    if name is not None and not isinstance(name, str):
        raise PreferenceError(f"{where}: the name must be a text, not {name!r}")
    return _validated(kind, values, objectives, where, name)


def is_one_hot(preference: Preference) -> bool:
    """Whether exactly one objective counts, positively, and all others are exactly 0 (weights or a direction)."""
    wanted = [value for value in preference.values.values() if value != 0.0]
    return preference.kind != "thresholds" and len(wanted) == 1 and wanted[0] > 0.0


def numbers(text: str, objectives: tuple[str, ...], where: str) -> dict[str, float]:
    """``helpful=0.8, harmless=0.6`` -> the finite number of each objective that is named, in the order of the text.

    Nothing is asked of their sum or signs. ``where`` is the key that an error names. Raises PreferenceError.
    """
    items = _items(text.strip(), where, ("=",), "name=number")
    unknown = [name for name in items if name not in objectives]
    if unknown:
        raise PreferenceError(f"{where}: there is no objective '{unknown[0]}'{_nearest(unknown[0], objectives)}")
    return {name: _number(number, f"{where}.{name}") for name, (number, _) in items.items()}


def format(preference: Preference) -> str:
    """One short line for people, such as ``helpful=0.7, harmless=0.3``; four digits, so not for reading back."""
    sign = ">=" if preference.kind == "thresholds" else "="
    text = ", ".join(f"{name}{sign}{value:.4g}" for name, value in preference.values.items())
    text = f"direction {text}" if preference.kind == "direction" else text
    return text if preference.name is None else f"{preference.name} ({text})"


# --- the forms ------------------------------------------------------------------------------------------------------


def _parse_text(text: str, objectives: tuple[str, ...], named: Mapping[str, Preference], where: str) -> Preference:
    if not text:
        raise PreferenceError(f"{where}: empty")
    if any(sign in text for sign in "=<>"):
        return _parse_items(text, objectives, where)
    if text in named and text in (*objectives, EQUAL):
        raise PreferenceError(f"{where}: '{text}' names a preset and something else; rename the preset")
    if text in named:
        return replace(parse(named[text], objectives, where=where), name=text)
    if text in objectives:
        return _validated("weights", {text: 1.0}, objectives, where, text)
    if text == EQUAL:
        return _validated("weights", dict.fromkeys(objectives, 1 / len(objectives)), objectives, where, text)
    known = [*named, *objectives, EQUAL]
    raise PreferenceError(f"{where}: '{text}' is no preset and no objective{_nearest(text, known)}")


def _parse_items(text: str, objectives: tuple[str, ...], where: str) -> Preference:
    found = _items(text, where, ("=", ">=", "<=", "<", ">"), "name=number or name>=number")
    items = {name: number for name, (number, _) in found.items()}
    signs = {sign for _, sign in found.values()}
    if signs == {"="}:
        return _parse_mapping(items, objectives, where)
    if signs == {">="}:
        return _validated("thresholds", items, objectives, where)
    if signs == {"=", ">="}:
        raise PreferenceError(f"{where}: weights (=) and thresholds (>=) in one preference; choose one of the two")
    raise PreferenceError(f"{where}: only = and >= have a meaning; a threshold is a lower bound, larger is better")


def _items(text: str, where: str, signs: tuple[str, ...], form: str) -> dict[str, tuple[str, str]]:
    """Name -> (number as it is written, sign). Raises PreferenceError for anything that is not of that form."""
    items: dict[str, tuple[str, str]] = {}
    for item in _split(text):
        match = _ITEM.fullmatch(item)
        if match is None or not match["name"] or not match["number"] or match["sign"] not in signs:
            raise PreferenceError(f"{where}: '{item}' is not of the form {form}")
        if match["name"] in items:
            raise PreferenceError(f"{where}: '{match['name']}' stands there twice")
        items[match["name"]] = match["number"].strip(), match["sign"]
    return items


def _split(text: str) -> list[str]:
    """Items are separated by commas or white space; white space around a sign or in a fraction separates nothing."""
    tight = re.sub(r"\s*(>=|<=|=|>|<|/)\s*", r"\1", text)
    return [item.strip() for part in tight.split(",") for item in (part.split() or [""])]


def _parse_mapping(value: Mapping[Any, Any], objectives: tuple[str, ...], where: str) -> Preference:
    if not value:
        raise PreferenceError(f"{where}: empty; give each objective a weight")
    form = next(iter(value))
    if form not in _WRAPPERS or form in objectives:
        return _validated("weights", value, objectives, where)
    if len(value) > 1:
        raise PreferenceError(f"{where}: '{form}' must stand alone, found {', '.join(map(str, value))}")
    content, place = value[form], f"{where}.{form}"
    if form == "angle":
        return _from_angle(_number(content, place), objectives, place)
    if not isinstance(content, Mapping) or not content:
        raise PreferenceError(f"{place}: {content!r} is not a mapping of objectives to numbers")
    return _validated(form, content, objectives, place)


def _from_angle(degrees: float, objectives: tuple[str, ...], where: str) -> Preference:
    if len(objectives) != 2:
        raise PreferenceError(f"{where}: an angle needs exactly two objectives, there are {len(objectives)}")
    radians = math.radians(degrees)
    # 90 degrees means exactly (0, 1), though the cosine of the nearest float is 6e-17.
    values = [0.0 if abs(number) < 1e-15 else number for number in (math.cos(radians), math.sin(radians))]
    return _validated("direction", dict(zip(objectives, values, strict=True)), objectives, where)


# --- the rules ------------------------------------------------------------------------------------------------------


def _validated(
    kind: Any, values: Mapping[Any, Any], objectives: tuple[str, ...], where: str, name: str | None = None
) -> Preference:
    unknown = [key for key in values if key not in objectives]
    if unknown:
        raise PreferenceError(f"{where}: there is no objective '{unknown[0]}'{_nearest(str(unknown[0]), objectives)}")
    numbers = {key: _number(values[key], f"{where}.{key}") for key in objectives if key in values}
    if not numbers:
        raise PreferenceError(f"{where}: empty; name at least one of {', '.join(objectives)}")
    if kind == "thresholds":
        if len(numbers) == len(objectives):
            raise PreferenceError(f"{where}: every objective has a threshold; leave out the one to be maximised")
        return Preference(kind, numbers, name)
    (_check_weights if kind == "weights" else _check_direction)(numbers, where)
    return Preference(kind, {key: numbers.get(key, 0.0) for key in objectives}, name)


def _check_weights(numbers: Mapping[str, float], where: str) -> None:
    negative = [key for key, number in numbers.items() if number < 0]
    if negative:
        raise PreferenceError(
            f"{where}: the weight of '{negative[0]}' is negative ({numbers[negative[0]]:g}); weights are 0 or more, "
            "a vector with negative components is written {direction: {...}}"
        )
    total = math.fsum(numbers.values())
    if total == 0:
        raise PreferenceError(f"{where}: all weights are 0")
    if abs(total - 1) > TOLERANCE:
        raise PreferenceError(
            f"{where}: the weights add up to {total:.9g}, not 1 (within {TOLERANCE:g}); "
            f"write {_scaled(numbers, total)} if that is meant"
        )


def _check_direction(numbers: Mapping[str, float], where: str) -> None:
    length = math.hypot(*numbers.values())
    if length == 0:
        raise PreferenceError(f"{where}: all components are 0")
    if abs(length - 1) > TOLERANCE:
        raise PreferenceError(
            f"{where}: the direction has length {length:.9g}, not 1 (within {TOLERANCE:g}); "
            f"write {_scaled(numbers, length)} if that is meant"
        )


def _number(value: object, where: str) -> float:
    """A finite number, or a text that holds one or a fraction such as "1/3"."""
    try:
        if isinstance(value, bool) or not isinstance(value, Real | str):
            raise ValueError
        if isinstance(value, str) and "/" in value:
            above, below = value.split("/")
            number = float(above) / float(below)
        else:
            number = float(value)
    except (ValueError, OverflowError, ZeroDivisionError):
        raise PreferenceError(f"{where}: {value!r} is not a number or a fraction such as 1/3") from None
    if not abs(number) < 1e100:
        raise PreferenceError(f"{where}: {value!r} is not a finite number (below 1e100)")
    return number + 0.0  # -0.0 becomes 0.0


def _scaled(numbers: Mapping[str, float], by: float) -> str:
    return ", ".join(f"{key}={number / by:.9g}" for key, number in numbers.items())


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(names)}"

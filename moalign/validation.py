"""Turns what pydantic found wrong into one line per key: what is wrong, where, and the nearest name that exists."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` or the list of known names; starts with "; " so that it can end a message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else ""


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "", beside: Collection[str] = ()) -> str:
    """One line per finding, with the key's full path: ``train.lrr: unknown key; did you mean 'lr'?``.

    ``beside``: what else may stand where the model's own keys do.
    """
    return "\n".join(_line(finding, model, prefix, beside) for finding in error.errors())


def _line(finding: Any, model: type[BaseModel], prefix: str, beside: Collection[str]) -> str:
    path = [str(part) for part in finding["loc"]]
    key = ".".join([prefix, *path] if prefix else path) or "configuration"
    if finding["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1]) | (set(beside) if len(path) == 1 else set())
        return f"{key}: unknown key{nearest(path[-1], known)}"
    if finding["type"] == "missing":
        return f"{key}: this key is required"
    message = finding["msg"].removeprefix("Value error, ")
    given = finding.get("input")
    shown = "" if isinstance(given, dict | list | BaseModel) else f" (got {given!r})"
    return f"{key}: {message[0].lower() + message[1:]}{shown}"


def _fields_at(model: type[BaseModel], path: list[str]) -> set[str]:
    """The keys that exist at ``path`` inside ``model``; parts that are keys of a mapping are passed over."""
    current: type[BaseModel] = model
    for part in path:
        annotation = current.model_fields[part].annotation if part in current.model_fields else None
        inner = _model_in(annotation)
        current = inner or current
    return set(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None

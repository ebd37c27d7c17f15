"""What readers share of objectives: which of those a file offers are asked for, and who judged a pair."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from moalign.api import DataError


def asked_for(
    offered: Sequence[str],
    names: Mapping[str, str],
    objectives: Sequence[str],
    file: str,
    line: int,
    known: Collection[str] = (),
) -> dict[str, str]:
    """Objective -> what the file calls it, of ``offered``.

    ``names``: where the configuration calls it otherwise. ``known``: all that files of the format may offer, if more.
    Where the file offers one judgement and the configuration has one objective, they are the same.

    Raises DataError where ``names`` speaks of what is not there, and where no objective is offered.
    """
    for inner in names.values():
        if inner not in (known or offered):
            _unknown(inner, known or offered, "which the format does not have", file, line)
    check_named(names, objectives, file, line)
    if not objectives:
        unnamed = {name: name for name in offered if name not in names.values()}
        return unnamed | {name: inner for name, inner in names.items() if inner in offered}
    found = {name: names.get(name, name) for name in objectives if names.get(name, name) in offered}
    if not found and len(offered) == len(objectives) == 1 and not names:
        found = {objectives[0]: offered[0]}
    if not found:
        fault = f"none of the objectives {', '.join(objectives)} is in this file; it offers {', '.join(offered)}"
        cure = f"say which is which in the reader's option names, such as {{{objectives[0]}: {offered[0]}}}"
        raise DataError(f"{fault}; {cure}", file=file, line=line)
    return found


def check_named(names: Iterable[str], objectives: Collection[str], file: str, line: int) -> None:
    """Raises DataError where the option ``names`` speaks of an objective that the configuration does not have."""
    for name in names:
        if objectives and name not in objectives:
            _unknown(name, objectives, "which is no objective", file, line)


def _unknown(name: str, known: Collection[str], what: str, file: str, line: int) -> None:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
    raise DataError(f"the reader's option names has '{name}', {what}; {hint}", file=file, line=line)


def judge_of(
    row: Mapping[str, Any],
    said: str | None,
    objectives: Sequence[str],
    file: str,
    line: int,
    by: str = "the reader's objective",
) -> str:
    """The objective that judged the row's pair: its column ``objective``, else ``said``, else the only one there is.

    ``by``: who said it. Raises ValueError for the row alone, DataError where it is the configuration's fault.
    """
    named = row.get("objective")
    if named is not None and not isinstance(named, str):
        raise ValueError(f"the column objective is not a name: {named!r}")
    if named:
        if objectives and named not in objectives:
            raise ValueError(f"unknown objective: {named!r}; the configuration has {', '.join(sorted(objectives))}")
        return named
    if said is not None:
        if objectives and said not in objectives:
            raise DataError(f"{by} '{said}' is none of {', '.join(sorted(objectives))}", file=file, line=line)
        return said
    if len(objectives) > 1:
        fault = "the row does not say which objective judged it"
        cure = f"add a column objective, or set the reader's objective to one of {', '.join(sorted(objectives))}"
        raise DataError(f"{fault}: {cure}", file=file, line=line)
    return objectives[0] if objectives else "preference"

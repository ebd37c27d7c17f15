"""``moalign plugins list``: a table on a terminal; elsewhere one line per plugin, however long, for grep and cut."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from moalign.commands.plugin_shadows import shadowed_distributions
from moalign.registry import KINDS, Registry


@dataclass(frozen=True)
class Row:
    """A plugin, or where the whole of it is out of reach, an entry point (kind is empty) or a distribution."""

    kind: str
    name: str
    summary: str
    paper: str
    distribution: str
    version: str
    status: str
    """ok, conflict, disabled, broken or shadowed"""
    reason: str = ""


def show(installed: Registry, kind: str | None, everything: bool, as_json: bool) -> None:
    """Print the plugins of a kind (None: all). What cannot be used is listed with ``everything``, else counted."""
    rows = [row for row in usable(installed) if kind in (None, row.kind)]
    rest = [row for row in unusable(installed) if kind in (None, row.kind) or not row.kind]
    rows += rest if everything else []
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    console = Console()
    if console.is_terminal:
        console.print(_table(rows))
    else:
        print(*_lines(rows), sep="\n")
    hidden = [] if everything else rest
    counts = [f"{sum(row.status == status for row in hidden)} {status}" for status in _statuses(hidden)]
    if counts:
        text = f"not listed: {', '.join(counts)}; `moalign plugins list --all` says which and why"
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def usable(installed: Registry) -> list[Row]:
    """Everything that a configuration can name, as it must name it."""
    rivals = {id(entry): group for group in installed.duplicates() for entry in group}
    rows = []
    for entry in (entry for kind in KINDS for entry in installed.of_kind(kind)):
        others = [rival for rival in rivals.get(id(entry), ()) if rival is not entry]
        claims = ", ".join(f"{rival.distribution} {rival.version}" for rival in others)
        reason = f"'{entry.name}' is also claimed by {claims}; write '{entry.full_name}'" if others else ""
        name, status = (entry.full_name, "conflict") if others else (entry.name, "ok")
        rows.append(
            Row(entry.kind, name, entry.summary, entry.paper, entry.distribution, entry.version, status, reason)
        )
    return rows


def unusable(installed: Registry) -> list[Row]:
    """What is disabled, broken or behind another installation of the same distribution."""
    rows = [
        Row(item.kind or "", item.name, "", "", item.distribution, item.version, "disabled", item.reason)
        for item in installed.left_out
    ]
    for item in installed.broken:
        reason = f"{item.reason}; {item.cure}"
        rows.append(Row("", item.entry_point, "", "", item.distribution, item.version, "broken", reason))
    for shadow in shadowed_distributions():
        rows.append(Row("", shadow.name, "", "", shadow.name, shadow.version, "shadowed", shadow.reason))
    return rows


def _statuses(rows: list[Row]) -> list[str]:
    return sorted({row.status for row in rows})


def _lines(rows: list[Row]) -> list[str]:
    """Columns of one width with two spaces between them, the long one last."""
    cells = [(row.kind or "-", row.name, f"{row.distribution} {row.version}", _about(row)) for row in rows]
    widths = [max((len(line[column]) for line in cells), default=0) for column in range(3)]
    return ["  ".join([*map(str.ljust, line[:3], widths), line[3]]) for line in cells]


def _about(row: Row) -> str:
    """One line, whatever a stranger's message looks like."""
    summary = f"{row.summary} ({row.paper})" if row.paper else row.summary
    status = "" if row.status == "ok" else f"{row.status}: {row.reason}"
    return " ".join("; ".join(part for part in (summary, status) if part).split())


def _table(rows: list[Row]) -> Table:
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("kind", "name", "from"):
        table.add_column(heading, no_wrap=True, overflow="fold")
    table.add_column("what it is", min_width=24)
    for row in rows:
        style = {"ok": "", "conflict": "yellow", "disabled": "dim", "shadowed": "yellow", "broken": "red"}[row.status]
        name = Text(row.name, style=style or "bold")
        table.add_row(row.kind or "-", name, Text(f"{row.distribution} {row.version}"), Text(_about(row), style=style))
    return table

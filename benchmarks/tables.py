"""One table, twice: in the terminal and as Markdown beside the JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks import measure

Cell = str


class Request(Protocol):
    """Something to be run."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a result is known again by."""


Asked = TypeVar("Asked", bound=Request)


@dataclass(frozen=True)
class Table:
    """``rows`` of as many cells as there are ``columns``; the first is text, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()


def show(tables: Sequence[Table], console: Console) -> None:
    for table in tables:
        drawn = RichTable(title=table.title, title_justify="left", title_style="bold")
        for number, column in enumerate(table.columns):
            drawn.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
        for note in table.notes:
            console.print(note, style="dim", highlight=False)


def markdown(heading: str, report: Mapping[str, Any], about: Sequence[str], tables: Sequence[Table]) -> str:
    """The report's commands and hardware, what it is about in paragraphs, its tables."""
    commands = [f"`{command}`" for command in report["commands"]]
    lines = [f"# {heading}", ""]
    for paragraph in [*commands, *_machines(report["results"]), *about]:
        lines += [paragraph, ""]
    for table in tables:
        lines += [f"## {table.title}", ""]
        lines.append(_line(table.columns))
        lines.append(_line(["---", *["---:"] * (len(table.columns) - 1)]))
        lines += [_line(row) for row in table.rows]
        lines.append("")
        lines += [line for note in table.notes for line in (note, "")]
    return "\n".join(lines)


def _machines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each machine and each set of versions that results are from, with the date of its first."""
    first: dict[str, str] = {}
    for facts in (found["hardware"] for found in results):
        first.setdefault(json.dumps(facts | {"date": ""}, sort_keys=True), measure.hardware_line(facts))
    return list(first.values())


def mean(values: Sequence[float]) -> Cell:
    """With the standard deviation, where there are several."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def begin(benchmark: str, command: str, earlier: Path | None) -> dict[str, Any]:
    """A report without results, or with those of an earlier one. Raises ValueError where that is of another kind."""
    report: dict[str, Any] = {"benchmark": benchmark, "commands": [], "results": []}
    if earlier is not None and earlier.exists():
        report = json.loads(earlier.read_text())
        if report.get("benchmark") != benchmark:
            raise ValueError(f"{earlier}: not a report of {benchmark}")
    report["commands"].append(command)
    return report


def write(output: Path, report: Mapping[str, Any], text: str) -> Path:
    """``output`` as JSON and the Markdown beside it; returns the latter's path."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    beside = output.with_suffix(".md")
    beside.write_text(text)
    return beside


def missing(wanted: Sequence[Asked], report: Mapping[str, Any]) -> list[Asked]:
    """Those without a result yet."""
    return [
        request
        for request in wanted
        if not any(request.identity.items() <= result.items() for result in report["results"])
    ]

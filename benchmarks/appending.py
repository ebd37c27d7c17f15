"""A table that is taken in parts: what is missing is run, one request after the other, and written after each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console

from benchmarks import measure, tables
from benchmarks.processes import ChildError, in_turn
from moalign.validation import nearest

Seeds = Annotated[list[int] | None, typer.Option(min=0, help="may be repeated; default 0 1 2")]
Further = Annotated[list[str] | None, typer.Option("--set", help="key.path=value, for all; may be repeated")]
Threads = Annotated[int | None, typer.Option(min=1, help="of torch; default: torch's own choice")]
AtMost = Annotated[int | None, typer.Option(min=1, help="so many trainings now; --append goes on with others")]
Output = Annotated[Path | None, typer.Option(help="JSON; what is made of it is written beside it")]
Append = Annotated[bool, typer.Option(help="keep what is in the output already, and run what is missing")]


class Request(tables.Request, Protocol):
    """Something to be run in a process that serves many."""

    @property
    def name(self) -> str:
        """As it stands among what was not run."""

    @property
    def threads(self) -> int | None:
        """Of torch; None: its own choice."""


def run(
    benchmark: str,
    wanted: Sequence[Request],
    work: Callable[[Any, Connection], None],
    tables_of: Callable[[Mapping[str, Any]], list[tables.Table]],
    write: Callable[[Path, Mapping[str, Any]], None],
    output: Path | None,
    append: bool,
    at_most: int | None,
) -> None:
    """Run what has no result yet in the output, ``at_most`` so many, and show the tables.

    ``work`` gets the requests in a child process and sends a "result" for each. One that fails stands among what was
    not run, with the last line of its error.
    """
    console = Console()
    report = tables.begin(benchmark, measure.command_line(f"benchmarks.{benchmark}"), output if append else None)
    report["commands"] = list(dict.fromkeys(report["commands"]))
    report.setdefault("not_run", {})
    asked = tables.missing(wanted, report)[:at_most]
    with console.status("") as status:
        threads = wanted[0].threads if wanted else None
        for request, found in in_turn(work, asked, threads, lambda each: status.update(each.name)):
            report["not_run"].pop(request.name, None)
            if isinstance(found, ChildError):
                report["not_run"][request.name] = str(found).strip().splitlines()[-1]
            else:
                report["results"].append(request.identity | found)
            if output is not None and report["results"]:
                write(output, report)
    tables.show(tables_of(report), console)
    if report["results"]:
        console.print(measure.hardware_line(report["results"][-1]["hardware"]), highlight=False)


def check_names(asked: Iterable[str] | None, known: Iterable[str], option: str) -> None:
    """Raises typer.BadParameter where there is no such name."""
    for name in asked or ():
        if name not in known:
            raise typer.BadParameter(f"there is no {name!r}{nearest(name, known)}", param_hint=option)

"""Every search with every way of training, in worlds whose best front is known: front share against training tokens."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import front_quality_tables, measure, tables
from benchmarks.front_quality_run import WORLDS, Request, belongs, reached, ways, why_not
from benchmarks.processes import ChildError, run_apart
from benchmarks.tables import missing
from benchmarks.train_setup import Assignment, make_quiet
from benchmarks.train_task import Task
from moalign import registry
from moalign.validation import nearest

SEEDS = (0, 1, 2)


def main(
    world: Annotated[list[str] | None, typer.Option(help="two, three or reply; may be repeated; default all")] = None,
    method: Annotated[list[str] | None, typer.Option(help="by its name; may be repeated; default all")] = None,
    search: Annotated[list[str] | None, typer.Option(help="by its name; may be repeated; default all")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="may be repeated; default 0 1 2")] = None,
    further: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value, for every sweep; may be repeated")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: torch's own choice")] = None,
    at_most: Annotated[int | None, typer.Option(min=1, help="so many sweeps now; --append goes on with others")] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON; a Markdown table and a picture are written beside it")
    ] = None,
    append: Annotated[bool, typer.Option(help="keep what is in the output already, and run what is missing")] = False,
) -> None:
    """Sweep after sweep, each an ordinary one measured exactly; no network. The output is written after each."""
    console = Console()
    report = tables.begin("front_quality", measure.command_line("benchmarks.front_quality"), output if append else None)
    report["commands"] = list(dict.fromkeys(report["commands"]))
    for names, known, option in (
        (world, WORLDS, "--world"),
        (method, ways()["methods"], "--method"),
        (search, ways()["searches"], "--search"),
    ):
        for name in names or ():
            if name not in known:
                raise typer.BadParameter(f"there is no {name!r}{nearest(name, known)}", param_hint=option)
    asked = requests(world, method, search, seed or SEEDS, further or (), threads)
    wanted = installed(asked, report)
    for request in missing(wanted, report)[:at_most]:
        with console.status(request.name):
            try:
                report["results"].append(run(request))
            except ChildError as error:  # one that fails must not take the others with it
                report["not_run"][request.name] = f"failed, {str(error).strip().splitlines()[-1]}"
        if output is not None and report["results"]:
            tables.write(output, report, front_quality_tables.text_of(report))
            front_quality_tables.draw(report["results"], output.with_suffix(".png"))
    tables.show(front_quality_tables.tables_of(report), console)
    for name, reason in report["not_run"].items():
        console.print(f"{name}: not run, {reason}", style="dim", highlight=False)
    if report["results"]:
        console.print(measure.hardware_line(report["results"][-1]["hardware"]), highlight=False)


def requests(
    worlds: Sequence[str] | None,
    methods: Sequence[str] | None,
    searches: Sequence[str] | None,
    seeds: Sequence[int],
    further: Sequence[str] = (),
    threads: int | None = None,
) -> list[Request]:
    """All that the file crosses, seed by seed, so that what is there after a while compares all of them."""
    every = itertools.product(
        seeds, worlds or WORLDS, methods or list(ways()["methods"]), searches or list(ways()["searches"])
    )
    return [
        Request(world, method, search, seed, tuple(further), threads)
        for seed, world, method, search in every
        if belongs(world, method, search, methods or ())
    ]


def installed(asked: Sequence[Request], report: dict[str, Any]) -> list[Request]:
    """Those that can be run; of the others the report says what is missing, by their names."""
    known = registry.discover()
    reasons = {request: why_not(request, known) for request in asked}
    earlier = report.get("not_run", {})
    names = {request.name for request in asked}
    report["not_run"] = {name: reason for name, reason in earlier.items() if name not in names} | {
        request.name: reason for request, reason in reasons.items() if reason
    }
    return [request for request in asked if reasons[request] is None]


def run(request: Request, target: Callable[[Any, Connection], None] | None = None) -> dict[str, Any]:
    """One sweep in a process of its own."""
    found: dict[str, Any] = run_apart(target or work, request, request.threads)
    return request.identity | found


def work(request: Request, connection: Connection) -> None:
    """The child process."""
    with tempfile.TemporaryDirectory(prefix="moalign-front-quality-") as directory:
        make_quiet(Assignment("", Task("", 0), directory, "cpu", request.threads, profile=False))
        found = reached(request)
    connection.send(("result", found | {"hardware": measure.hardware(torch.device("cpu"))}))


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()

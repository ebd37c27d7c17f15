"""``moalign compare``: runs of the same objectives beside each other, such as those of several seeds."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moalign.errors import RunError, UserError

TITLES = {
    "hypervolume": "hypervolume",
    "igd_plus": "IGD+",
    "expected_utility": "expected\nutility",
    "sparsity": "sparsity",
}


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, at least two.")],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=NUMBER,...",
            help="Reference point of the hypervolume for all, in the units of the fronts (minimised scores: negated).",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw what every, half of and any of the runs attain; two objectives."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Compare fronts of the same objectives: measures by run, their spread, and what chance may have decided."""
    from moalign import preference
    from moalign.storage import canonical_json
    from moalign.sweeps import comparison

    fronts = _fronts(runs)
    corner = None
    if reference is not None:
        names = tuple(objective["name"] for objective in next(iter(fronts.values()))["objectives"])
        corner = preference.numbers(reference, names, "--reference")
    found = comparison.compare(fronts, corner)
    if picture is not None:
        _draw(found, fronts, picture)
    if as_json:
        sys.stdout.write(canonical_json(found))
        return
    _print(Console(), found)


def _fronts(runs: list[Path]) -> dict[str, dict[str, Any]]:
    """By the runs' names as they were typed, each once."""
    from moalign.commands.select import read_or_compute

    fronts: dict[str, dict[str, Any]] = {}
    places: dict[Path, Path] = {}
    for run in runs:
        if (place := run.resolve()) in places:
            again = "" if places[place] == run else f", the other time as {places[place]}"
            raise RunError(f"{run} is named twice{again}")
        places[place] = run
        fronts[str(run)] = read_or_compute(run)
    return fronts


def _draw(found: Mapping[str, Any], fronts: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    from moalign.report.attained import draw

    if file.suffix != ".png":
        raise UserError(f"--picture: {file} does not end in .png")
    if len(found["objectives"]) != 2:
        raise UserError(f"--picture: it shows two objectives, and the runs have {len(found['objectives'])}")
    draw(found, fronts, file)


def _print(console: Console, found: Mapping[str, Any]) -> None:
    from moalign.report import wording

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("on the\nfront", justify="right")
    for title in TITLES.values():
        table.add_column(title, justify="right")
    for run in found["runs"]:
        cells = [wording.number(run[measure]) for measure in TITLES]
        cells[2] = wording.measure(run["expected_utility"], run["expected_utility_stderr"])
        table.add_row(Text(wording.printable(run["run"])), f"{run['on_front']} of {run['points']}", *cells)
    table.add_section()
    for key, title in (("mean", "mean"), ("deviation", "deviation"), ("lowest", "lowest"), ("highest", "highest")):
        bands = [found["bands"][measure] for measure in TITLES]
        table.add_row(title, "", *(wording.number(None if band is None else band[key]) for band in bands))
    console.print(table)
    for line in _lines(found):
        console.print(wording.printable(line), highlight=False, markup=False, soft_wrap=True)


def _lines(found: Mapping[str, Any]) -> list[str]:
    from moalign.report import wording

    corner = ", ".join(f"{name} {wording.number(value)}" for name, value in found["reference_point"].items())
    lines = [f"hypervolume from {corner}; IGD+ from the non-dominated points of all runs"]
    for pair in found["pairs"]:
        one, other = pair["runs"]
        if pair["differ"]:
            more, less = (one, other) if pair["difference"] > 0 else (other, one)
            said = wording.measure(abs(pair["difference"]), pair["stderr"])
            lines.append(f"{more} serves better than {less}: expected utility {said} more, beyond chance")
    if not any(pair["differ"] for pair in found["pairs"]):
        known = all(pair["differ"] is not None for pair in found["pairs"])
        lines.append(
            "no two runs differ in expected utility by more than 1.96 standard errors"
            if known
            else "scores without standard errors: nothing is said about chance"
        )
    matched = [point for pair in found["pairs"] for point in pair["points"]]
    if matched:
        apart = sum(point["differ"] for point in matched)
        lines.append(f"of {len(matched)} pairs of candidates for the same preference, {apart} differ beyond chance")
    return lines

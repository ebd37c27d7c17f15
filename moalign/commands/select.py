"""``moalign select``: one point of a front, by what it must keep and what decides."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moalign.commands import steered

if TYPE_CHECKING:
    from moalign.sweeps.choice import Choice

BOUND = "NAME=NUMBER"


def select(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory; front.json is enough.")],
    at_least: Annotated[
        list[str] | None,
        typer.Option("--at-least", metavar=BOUND, help="A score that the point must have; may be given several times."),
    ] = None,
    at_most: Annotated[
        list[str] | None,
        typer.Option("--at-most", metavar=BOUND, help="The same for an objective to be minimised, in its own units."),
    ] = None,
    maximise: Annotated[
        str | None, typer.Option("--maximise", "--maximize", metavar="NAME", help="The objective that decides.")
    ] = None,
    knee: Annotated[
        bool, typer.Option("--knee", help="The knee: where giving way in any objective begins to cost.")
    ] = False,
    nearest: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=NUMBER,...", help="Gains over the reference point in this ratio, as nearly as can be."
        ),
    ] = None,
    best: Annotated[
        str | None, typer.Option(metavar="NAME=WEIGHT,...", help="The highest weighted score; weights add up to 1.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Choose a point of the front; scores are those of `moalign front`, larger is better everywhere."""
    from moalign.storage import canonical_json
    from moalign.sweeps import choice

    front = read_or_compute(run_directory)
    wish = choice.wish(
        front,
        at_least=_joined(at_least),
        at_most=_joined(at_most),
        maximise=maximise,
        knee=knee,
        nearest=nearest,
        best=best,
    )
    chosen = choice.choose(front, wish)
    if as_json:
        point = next(point for point in front["points"] if point["id"] == chosen.id)
        kept = {key: point[key] for key in ("preference", "scores", "kind")} | {"stderr": point["stderr"]}
        sys.stdout.write(canonical_json(asdict(chosen) | {"point": kept}))
        return
    _print(Console(), front, chosen)


def _joined(texts: list[str] | None) -> str | None:
    return ",".join(texts) if texts else None


def read_or_compute(directory: Path) -> dict[str, Any]:
    """``front.json``, checked; of a run that is not finished, what there is so far."""
    from moalign.report.source import check_front, read_front
    from moalign.sweeps import front

    if (directory / front.FRONT).exists():
        return read_front(directory)
    found = front.read(directory)
    check_front(found, directory)
    steered.note_unfinished(directory)
    return found


def _print(console: Console, front: Mapping[str, Any], chosen: Choice) -> None:
    from moalign.report import wording

    names = wording.objective_names(front)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("candidate", overflow="fold")
    table.add_column("preference")
    for objective in front["objectives"]:
        table.add_column(Text(wording.objective_title(objective, 20)), justify="right")
    for point in front["points"]:
        if point["id"] in (chosen.id, *chosen.alike):
            mine = point["id"] == chosen.id
            scores = [wording.measure(point["scores"][name], point["stderr"].get(name)) for name in names]
            said = wording.preference_text(point["preference"], names)
            name = ("→ " if mine else "  ") + wording.printable(point["id"])
            table.add_row(Text(name), Text(said), *scores, style="" if mine else "dim")
    console.print(table)
    lines = [f"{chosen.id}: {chosen.reason}"]
    if chosen.alike:
        lines.append(f"not told apart from it, within 1.96 standard errors: {', '.join(chosen.alike)}")
    lines += chosen.notes
    for line in lines:
        console.print(wording.printable(line), highlight=False, markup=False, soft_wrap=True)

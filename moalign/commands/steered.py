"""What the commands that steer by a preference share: how a point is named, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moalign.errors import PreferenceError

if TYPE_CHECKING:
    from moalign.sweeps.archive import Archive, Mix

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Prefer = Annotated[
    str | None,
    typer.Option(metavar="PREFERENCE", help="helpful=0.8,harmless=0.2, or a name, such as equal; weights add up to 1."),
]
Candidate = Annotated[str | None, typer.Option(metavar="ID", help="One point of the front, by its id.")]
Base = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The base model, if not where the run says; a directory or hub name."),
]
Rank = Annotated[int | None, typer.Option(min=1, help="Compress the adapter to this rank; without it a mix is exact.")]


def chosen(directory: Path, prefer: str | None, candidate: str | None) -> tuple[Archive, Mix]:
    """The run, and what of it is meant. Raises PreferenceError unless exactly one of the two says so."""
    from moalign.sweeps.archive import Archive

    archive = Archive.open(directory)
    if (prefer is None) == (candidate is None):
        raise PreferenceError("give --prefer or --candidate, one of the two; `moalign select` finds a candidate")
    if candidate is not None:
        return archive, archive.of_candidate(candidate)
    return archive, archive.for_preference(prefer)


def say(mix: Mix) -> None:
    """On stderr, which candidates' adapters stand for the preference."""
    from moalign import preference

    note(("" if mix.wanted is None else f"{preference.format(mix.wanted)}: ") + mix.text)


def note(text: str) -> None:
    """On stderr, as it stands but for what would steer a terminal."""
    from moalign.report import wording

    console().print(wording.printable(text), highlight=False, markup=False, soft_wrap=True)


def phase(what: str) -> None:
    """On stderr, what takes a while."""
    console().print(f"[dim]{what} …[/]", highlight=False)


def console() -> Console:
    return Console(stderr=True)

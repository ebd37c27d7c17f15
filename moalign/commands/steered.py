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
Posterior = Annotated[
    float | None,
    typer.Option(
        metavar="MASS",
        help="Draw an adapter from the posteriors of a run with train.posterior: each weight within its central "
        "interval of this probability; 0 is the mean.",
    ),
]
Seed = Annotated[int | None, typer.Option(metavar="SEED", help="Which draw, with --posterior; default 0.")]


def chosen(
    directory: Path,
    prefer: str | None,
    candidate: str | None,
    posterior: float | None = None,
    draw: int | None = None,
) -> tuple[Archive, Mix]:
    """The run, and what of it is meant. Raises PreferenceError unless exactly one of the first two says so."""
    from moalign.sweeps.archive import Archive

    archive = Archive.open(directory)
    note_unfinished(directory)
    if (prefer is None) == (candidate is None):
        raise PreferenceError("give --prefer or --candidate, one of the two; `moalign select` finds a candidate")
    mix = archive.for_preference(prefer) if candidate is None else archive.of_candidate(candidate)
    return archive, archive.drawn(mix, posterior, draw)


def note_unfinished(directory: Path) -> None:
    """On stderr, how to go on with the run, where it is not finished."""
    from moalign.sweeps import front

    if said := front.unfinished(directory):
        note(said)


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


def device() -> str:
    """Where a model runs if nobody says: an accelerator if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def console() -> Console:
    return Console(stderr=True)

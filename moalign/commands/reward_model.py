"""``moalign reward-model``: train scores by objective on judgements, and say what they are worth."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from moalign.registry import Registry
    from moalign.reward_models.config import RewardModelConfig

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Learn scores by objective from judgements."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML configuration; docs/reward-models.md explains it.")],
    out: Annotated[Path | None, typer.Option(help="Where it goes: a new directory; default runs/NAME.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. members=3.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what it will cost; train nothing.")
    ] = False,
    no_plugin: Annotated[list[str] | None, typer.Option("--no-plugin", help="Leave out a plugin.")] = None,
) -> None:
    """Train the reward model that the configuration describes, and report on held-out judgements."""
    from moalign import registry
    from moalign.reward_models import config as configuration
    from moalign.reward_models.archive import check_vacant
    from moalign.reward_models.plan import prepare

    settings = configuration.load(config, overrides or ())
    installed = registry.discover(no_plugin or ())
    prepare(settings, installed)  # refuse in a second what can be refused without a model
    directory = out or Path("runs") / config.stem
    check_vacant(directory)
    console = Console()
    if dry_run:
        _dry_run(settings, installed, console)
        return
    from moalign.progress import ConsoleObserver
    from moalign.reward_models import training

    observer = ConsoleObserver(console)
    try:
        with _unwritten(directory):
            report = training.train(settings, directory, installed, observer)
    finally:
        observer.close()
    _show(report, console)
    console.print(f"\nwritten to {directory}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `moalign reward-model train` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of tables.")] = False,
) -> None:
    """What a reward model was worth on held-out judgements when it was trained."""
    from moalign import storage
    from moalign.reward_models.archive import read_report

    content = read_report(directory)
    if as_json:
        sys.stdout.write(storage.canonical_json(content))
        return
    _show(content, Console())


def _show(content: Mapping[str, Any], console: Console) -> None:
    from moalign.report.judged import notes, tables

    for table in tables(content):
        console.print(table)
        console.print()
    for note in notes(content):
        console.print(note, style="dim", highlight=False, markup=False)


def _dry_run(settings: RewardModelConfig, installed: Registry, console: Console) -> None:
    from moalign.progress import ConsoleObserver, duration
    from moalign.report.table import summary_table
    from moalign.reward_models import training
    from moalign.reward_models.plan import prepare
    from moalign.sweeps.observe import Observer

    ConsoleObserver(console).on_phase("loading, and training a few steps that are thrown away")
    shop = training.open_shop(prepare(settings, installed), Observer())
    training.rehearse(shop)
    together, seconds = training.seconds_per_step(shop)
    passes = -(-settings.members // together)
    steps = settings.train.steps
    lines = [
        ("model", settings.model.path),
        ("data", settings.data.path),
        ("form", settings.reward_model.name),
        ("objectives", ", ".join(settings.objective_names)),
        *(("", f"{reason}: {count}") for reason, count in sorted(shop.material.counts.items())),
        ("members", f"{settings.members}, {together} in a pass"),
        ("steps", f"{steps:,} each, {seconds:.3f} s for a step of {together}"),
        ("time", f"about {duration(seconds * steps * passes)} of training, and a look at what was held out"),
    ]
    console.print(summary_table(lines))
    for warning in shop.material.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    console.print("nothing was written")


@contextmanager
def _unwritten(directory: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"\nstopped; nothing was written to {directory}; the next start trains from the beginning",
            highlight=False,
            markup=False,
        )
        raise

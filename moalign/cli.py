"""The command line: parse, call, print. Whatever takes long to import is imported by the command that needs it."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moalign import calls, supervisor
from moalign.commands import data as data_commands
from moalign.commands import plugins as plugin_commands
from moalign.commands import reward_model as reward_model_commands
from moalign.commands.compare import compare
from moalign.commands.evaluate import evaluate
from moalign.commands.export import export
from moalign.commands.generate import generate
from moalign.commands.select import select
from moalign.errors import MoalignError, NoSpaceError

app = typer.Typer(
    help="Train a language model for several objectives at once; get the whole trade-off back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(plugin_commands.app, name="plugins", help="What is installed.")
app.add_typer(data_commands.app, name="data", help="Look at data before training on it.")
app.add_typer(reward_model_commands.app, name="reward-model", help="Learn scores by objective from judgements.")

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, e.g. train.lr=1e-4 or search.budget.tokens=250000."
    ),
]
NoPlugin = Annotated[list[str] | None, typer.Option("--no-plugin", help="Leave out a plugin or a distribution.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory; an unfinished demo in it goes on.")] = Path("runs/demo"),
) -> None:
    """The main job on the embedded model, in a world whose front is known exactly. About two minutes on two cores."""
    from moalign import registry
    from moalign.demo import job
    from moalign.report.page import write_page

    with _watching() as (console, observer), _resumable(out):
        front = job.run_demo(out, registry.discover(), observer)
        write_page(out)
    _show(console, front, out)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="Where to write it; never overwrites.")],
    recipe: Annotated[
        str, typer.Option(help="What to start from: conditioned, dpa, dpo, dynamic, iterated, mo-grpo, modpo or rebel.")
    ] = "dpo",
) -> None:
    """Write a commented starter configuration."""
    from moalign import recipes, storage

    text = recipes.read(recipe)
    if file.exists():
        raise typer.BadParameter(f"{file} exists; it is not overwritten", param_hint="FILE")
    storage.write_text(file, text)
    where = shlex.quote(str(file))
    _print_path(Console(), f"wrote {file}; next: moalign sweep {where} --dry-run")


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="A YAML configuration; `moalign init` writes one.")],
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME.")] = None,
    overrides: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what it will cost; train nothing.")
    ] = False,
    no_plugin: NoPlugin = None,
) -> None:
    """Train the front that the configuration describes."""
    from moalign import config as configuration
    from moalign import registry
    from moalign.sweeps.plan import prepare

    settings = configuration.load(config, overrides or ())
    installed = registry.discover(no_plugin or ())
    plan = prepare(settings, installed)  # refuse in a second what can be refused without a model
    directory = out or Path("runs") / config.stem
    with _watching() as (console, observer):
        if dry_run:
            from moalign.commands.dry_run import show

            show(plan, observer, console)
            return
        from moalign.python import finish
        from moalign.sweeps import run

        with _resumable(directory):
            if calls.begun():
                run.resume(directory, installed, observer)
            else:
                run.start(settings, directory, installed, observer)
            front = finish(directory, observer)
    _show(console, front, directory)


@app.command()
def resume(
    run_directory: Run,
    accept_plugin_change: Annotated[
        bool, typer.Option("--accept-plugin-change", help="Go on although plugins are of another version or file.")
    ] = False,
    no_plugin: NoPlugin = None,
) -> None:
    """Go on with an interrupted run; ends with the same front as an unbroken one."""
    from moalign import registry
    from moalign.python import finish
    from moalign.sweeps import run

    with _watching() as (console, observer), _resumable(run_directory):
        installed = registry.discover(no_plugin or ())
        run.resume(run_directory, installed, observer, accept_plugin_change=accept_plugin_change)
        front = finish(run_directory, observer)
    _show(console, front, run_directory)


@app.command()
def front(
    run_directory: Run,
    as_json: Annotated[bool, typer.Option("--json", help="Print front.json instead of a table.")] = False,
) -> None:
    """The front of a run, finished or not."""
    from moalign.report.table import show_front
    from moalign.storage import canonical_json
    from moalign.sweeps.front import read, unfinished

    result = read(run_directory)
    if as_json:
        sys.stdout.write(canonical_json(result))
        return
    console = Console()
    show_front(result, console)
    _print_path(console, unfinished(run_directory))


@app.command("report")
def write_report(run_directory: Run) -> None:
    """Write front.png and report.html from a run directory alone."""
    from moalign.report.page import write_page
    from moalign.sweeps import front

    unfinished = front.unfinished(run_directory)  # its front is not kept: it would pass for the whole one
    write_page(run_directory, front.read(run_directory) if unfinished else front.write(run_directory))
    console = Console()
    _print_path(console, f"{run_directory / 'front.png'}\n{run_directory / 'report.html'}")
    _print_path(console, unfinished)


for command in (select, compare, evaluate, generate, export):
    app.command()(command)


def _show(console: Console, front: dict[str, Any], directory: Path) -> None:
    from moalign.report.table import show_front

    show_front(front, console)
    _print_path(
        console,
        f"\nfront    {directory / 'front.json'}\npicture  {directory / 'front.png'}\n"
        f"report   {directory / 'report.html'}\nadapters {directory / 'candidates'}",
    )


def _print_path(console: Console, text: str) -> None:
    """As it stands, to be copied: neither cut at the terminal's edge nor read as markup; "" is no line."""
    if text:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _watching() -> Iterator[tuple[Console, Any]]:
    from moalign.progress import ConsoleObserver

    console = Console()
    observer = ConsoleObserver(console)
    try:
        yield console, observer
    finally:
        observer.close()


@contextmanager
def _resumable(directory: Path) -> Iterator[None]:
    """Say how to go on after Ctrl-C, SIGTERM or on a full disk; what was finished is in the journal already."""
    try:
        yield
    except (KeyboardInterrupt, NoSpaceError):
        if not (directory / "run.json").exists():
            Console(stderr=True).print("\nstopped; nothing was written yet")
        else:
            again = shlex.quote(str(directory))
            _print_path(Console(stderr=True), f"\nstopped; moalign resume {again} goes on from here")
        raise


def _terminate(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 the input was wrong, 1 it failed, 130 it was interrupted."""
    code = supervisor.stand_by()
    if code is not None:
        sys.exit(code)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except MoalignError as error:
        Console(stderr=True).print("[red]error:[/] ", end="")
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)

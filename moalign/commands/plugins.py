"""``moalign plugins``: what is installed, what one plugin takes, what is broken, a new package. None imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moalign import registry
from moalign.errors import ConfigError, UnknownPluginError
from moalign.validation import nearest

app = typer.Typer(no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_plugins(
    kind: Annotated[str | None, typer.Option(help="Only this kind.")] = None,
    as_json: AsJson = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also what is disabled, broken or shadowed, with the reason.")
    ] = False,
) -> None:
    """Every plugin by kind, with its distribution."""
    from moalign.commands import plugin_list

    plugin_list.show(registry.discover(), _kind(kind), everything, as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A plugin's name, or distribution:name.")], as_json: AsJson = False
) -> None:
    """Summary, paper, needs, options with their defaults, distribution, version and file of a plugin."""
    from moalign.commands import plugin_show

    plugin_show.show(registry.discover(), name, as_json)


@app.command()
def doctor(
    deadline: Annotated[float, typer.Option(help="Seconds that a plugin may take for one thing.", min=0.1)] = 60.0,
    everything: Annotated[
        bool, typer.Option("--all", help="Run the conformance kit on moalign's own plugins as well; takes minutes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Load and check every plugin, each distribution in a process of its own; exit code 1 if something is broken.

    moalign's own plugins are loaded; its tests run the conformance kit on them.
    """
    from moalign.commands import plugin_doctor

    if plugin_doctor.show(plugin_doctor.examine(deadline, everything), as_json):
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="The name in configurations: lower case letters, digits and hyphens.")],
    kind: Annotated[str, typer.Option(help=f"One of {', '.join(registry.KINDS)}.", show_default=False)] = "",
    to: Annotated[Path, typer.Option(help="The folder in which the package's folder is made.")] = Path("."),
) -> None:
    """Write a complete package with a plugin that works: module, entry point, test, README. Never overwrites."""
    from moalign.commands import plugin_new

    if not kind:
        raise ConfigError(f"--kind: say what it is to be, one of {', '.join(registry.KINDS)}")
    plugin_new.write(name, str(_kind(kind)), to, registry.discover())


def _kind(kind: str | None) -> str | None:
    if kind is not None and kind not in registry.KINDS:
        raise UnknownPluginError(f"--kind: there is no kind '{kind}'{nearest(kind, registry.KINDS)}")
    return kind

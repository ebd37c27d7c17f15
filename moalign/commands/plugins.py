"""``moalign plugins list`` and ``show``; neither imports torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moalign import registry
from moalign.errors import UnknownPluginError
from moalign.validation import nearest

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_plugins(
    kind: Annotated[str | None, typer.Option(help="Only this kind.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Every plugin by kind, with its distribution; broken and conflicting ones are named."""
    installed = registry.discover()
    if kind is not None and kind not in registry.KINDS:
        raise UnknownPluginError(f"--kind: there is no kind '{kind}'{nearest(kind, registry.KINDS)}")
    entries = [entry for name in registry.KINDS if kind in (None, name) for entry in installed.of_kind(name)]
    if as_json:
        fields = ("kind", "name", "summary", "paper", "distribution", "version")
        print(json.dumps([{field: getattr(entry, field) for field in fields} for entry in entries], indent=2))
        return
    table = Table("kind", "name", "summary", "paper", "from", box=None, pad_edge=False)
    for entry in entries:
        origin = f"{entry.distribution} {entry.version}"
        table.add_row(entry.kind, f"[bold]{entry.name}[/]", entry.summary, entry.paper, origin)
    console = Console()
    console.print(table)
    for group in installed.duplicates():
        names = " and ".join(f"'{entry.full_name}'" for entry in group)
        console.print(f"[yellow]conflict[/] {group[0].kind} '{group[0].name}': write {names} to choose")
    for failure in installed.broken:
        console.print(f"[red]broken[/] {failure.distribution} {failure.version}: ", end="")
        console.print(failure.reason, markup=False)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A plugin's name, or distribution:name.")]) -> None:
    """Kind, summary, paper, configuration schema, distribution and version of a plugin."""
    installed = registry.discover()
    found = [entry for entry in installed.entries if name in (entry.name, entry.full_name)]
    if not found:
        names = {entry.name for entry in installed.entries}
        raise UnknownPluginError(f"no plugin is called '{name}'{nearest(name, names)}")
    console = Console()
    for entry in found:
        console.print(f"[bold]{entry.name}[/]  {entry.kind}  {entry.distribution} {entry.version}", highlight=False)
        console.print(entry.summary, markup=False)
        if entry.paper:
            console.print(entry.paper, markup=False)
        plugin = installed.load(entry)
        if plugin.__doc__:
            console.print(f"\n{plugin.__doc__.strip()}", markup=False, highlight=False)
        console.print("\nconfiguration schema")
        console.print_json(json.dumps(plugin.model_json_schema()))

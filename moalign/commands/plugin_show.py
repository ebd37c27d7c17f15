"""``moalign plugins show``: all that a plugin says about itself."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moalign.api import Plugin
from moalign.commands.plugin_options import Option, options
from moalign.errors import UnknownPluginError
from moalign.registry import KINDS, Entry, Registry
from moalign.validation import nearest


def show(installed: Registry, name: str, as_json: bool) -> None:
    """Print every plugin of this name, whatever its kind. Raises UnknownPluginError or PluginError."""
    found = [entry for entry in installed.entries if name in (entry.name, entry.full_name)]
    if not found:
        raise UnknownPluginError(_unknown(installed, name))
    described = [(describe(entry, plugin), plugin) for entry in found for plugin in [installed.load(entry)]]
    if as_json:
        content = [facts | {"schema": plugin.model_json_schema()} for facts, plugin in described]
        print(json.dumps(content, indent=2))
        return
    console = Console()
    for position, (facts, plugin) in enumerate(described):
        if position:
            console.print()
        _print(console, facts, options(plugin.model_json_schema()))


def describe(entry: Entry, plugin: type[Plugin]) -> dict[str, Any]:
    """What there is to say about a plugin beside its options; ``declares`` are the class attributes of its kind."""
    declared = {name: getattr(plugin, name) for name in sorted(KINDS[entry.kind].__class_vars__)}
    asked = declared.get("needs_with") or {}
    declared["needs_with"] = [f"{each} with {option}" for option, needs in asked.items() for each in sorted(needs)]
    return {
        "kind": entry.kind,
        "name": entry.name,
        "summary": entry.summary,
        "paper": entry.paper,
        "declares": {
            name: sorted(map(str, value)) if isinstance(value, set | frozenset) else value
            for name, value in declared.items()
            if isinstance(value, set | frozenset | str | int | float) or (name == "needs_with" and value)
        },
        "distribution": entry.distribution,
        "version": entry.version,
        "class": f"{plugin.__module__}:{plugin.__qualname__}",
        "file": getattr(sys.modules.get(plugin.__module__), "__file__", None),
        "documentation": inspect.cleandoc(plugin.__doc__ or ""),
    }


def _print(console: Console, facts: Mapping[str, Any], keys: list[Option]) -> None:
    console.print(Text.assemble((facts["name"], "bold"), f": {facts['kind']} of {facts['distribution']}"), end=" ")
    console.print(facts["version"], highlight=False, markup=False)
    _print_plain(console, facts["summary"])
    lines = {"paper": facts["paper"]}
    silent = {"later_kinds": [], "symmetric": False, "linear": True, "detaches": False}  # so of nearly all: not said
    lines |= {name: _value(value) for name, value in facts["declares"].items() if silent.get(name) != value}
    lines |= {"class": facts["class"], "file": facts["file"] or "unknown"}
    for name, value in lines.items():
        if value:
            _print_plain(console, f"{name + ':':<14} {value}")
    if facts["documentation"]:
        _print_plain(console, f"\n{facts['documentation']}")
    if not keys:
        _print_plain(console, "\nno options")
        return
    table = Table("key", "type", "default", "what it is", box=None, pad_edge=False)
    for key in keys:
        table.add_row(*map(Text, (key.key, key.type, key.default, key.description)))
    console.print()
    console.print(table)


def _print_plain(console: Console, text: str) -> None:
    """Long lines are left to the terminal, so that paths and sentences stay whole where the output is a file."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (", ".join(value) or "nothing") if isinstance(value, list) else str(value)


def _unknown(installed: Registry, name: str) -> str:
    """Why there is nothing to show: disabled, broken, or a name that nobody has."""
    message = f"no plugin is called '{name}'"
    reasons = [
        f"{item.kind or 'entry point'} '{item.name}' of {item.distribution} {item.version} is disabled: {item.reason}"
        for item in installed.left_out
        if name in (item.name, item.distribution, f"{item.distribution}:{item.name}")
    ]
    reasons += [
        f"{item.distribution} {item.version} could not be loaded: {item.reason}; {item.cure}"
        for item in installed.broken
    ]
    if not any(f"'{name}'" in reason for reason in reasons):
        message += nearest(name, {entry.name for entry in installed.entries})
    return "\n  ".join([message, *reasons])

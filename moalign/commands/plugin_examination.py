"""What ``moalign plugins doctor`` does with one distribution, in a process that may die of it (plugin_guard)."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from importlib import metadata
from types import ModuleType
from typing import IO, Any

from pydantic import ValidationError

from moalign import registry
from moalign.api import ENTRY_POINT_GROUP, Plugin
from moalign.registry import Entry, Registry


def main() -> None:
    """Write events to what was standard output; what the plugins print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        _examine(sys.argv[1], "kit" in sys.argv[2:], channel)


def _examine(distribution: str, thorough: bool, channel: IO[str]) -> None:
    points = [p for p in metadata.entry_points(group=ENTRY_POINT_GROUP) if registry.origin(p)[0] == distribution]
    entries: list[tuple[Registry, Entry]] = []
    for point in points:
        _tell(channel, "doing", what=f"importing '{point.value}' and calling its hooks")
        installed = registry.discover(entry_points=[point])
        for failure in installed.broken:
            _tell(channel, "broken", **asdict(failure))
        for entry in installed.entries:
            _tell(channel, "entry", **asdict(entry) | {"target": str(entry.target)})
            entries.append((installed, entry))
    kit = _kit() if thorough else None
    for installed, entry in entries:
        who = f"{entry.kind} '{entry.name}'"
        subject = {"plugin": who, "name": entry.name}
        _tell(channel, "doing", what=f"importing {who} from '{entry.target}'")
        try:
            plugin = installed.load(entry)
        except registry.PluginError as error:
            _tell(channel, "faulty", reason=str(error), **subject)
            continue
        if not thorough:
            continue
        _tell(channel, "doing", what=f"checking {who}")
        _tell(channel, **_check(kit, entry.kind, plugin), **subject)
    _tell(channel, "end")


def _kit() -> ModuleType | None:
    try:
        return importlib.import_module("moalign.testing")
    except ModuleNotFoundError:
        return None


def _check(kit: ModuleType | None, kind: str, plugin: type[Plugin]) -> dict[str, str]:
    """Run the conformance kit where it can be run without knowing options or data."""
    for module, install in plugin.requires.items():
        if importlib.util.find_spec(module) is None:
            return {"event": "unchecked", "reason": f"needs {module}, not installed; pip install '{install}'"}
    try:
        built = plugin()
    except ValidationError as error:
        keys = ", ".join(sorted({str(finding["loc"][0]) for finding in error.errors() if finding["loc"]}))
        return {"event": "unchecked", "reason": f"cannot be built without options ({keys or 'see its documentation'})"}
    except Exception as error:
        return {"event": "faulty", "reason": f"building it raised {type(error).__name__}: {error}"}
    check: Any = getattr(kit, f"check_{kind.replace('-', '_')}", None)
    if check is None:
        return {"event": "unchecked", "reason": "moalign.testing is not installed" if kit is None else "no such check"}
    if kind == "reader":
        return {"event": "unchecked", "reason": "is checked with rows of its own format, in its package's tests"}
    try:
        check(built)
    except BaseException as error:  # a stranger's code: SystemExit and worse are findings like any other
        return {"event": "faulty", "reason": str(error) or type(error).__name__}
    return {"event": "passed"}


def _tell(channel: IO[str], event: str, **content: Any) -> None:
    channel.write(json.dumps({"event": event, **content}) + "\n")
    channel.flush()

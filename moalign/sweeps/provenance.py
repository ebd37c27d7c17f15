"""Which plugins made a run: distribution, version and file of each, and what is done when one is another at a resume.

``run.json`` keeps the plugins that the run was started with. A change that somebody accepted is an event in the
journal, and what later starts are compared with is the record with all accepted changes made.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from moalign import storage
from moalign.api import Reader
from moalign.config import Shared
from moalign.data.loading import reader_of
from moalign.errors import PluginError, RunError
from moalign.registry import Entry, Registry

EVENT = "plugins changed"

Used = dict[str, Any]  # "combiner moalign:linear" -> {"distribution", "version", "sha256"}; long ago, the version
Changes = dict[str, dict[str, Any]]  # the same keys -> {"old": what it was or None, "new": what it is or None}


class Plan(Protocol):
    """What names its plugins: a sweep's plan, or a reward model's."""

    @property
    def config(self) -> Shared: ...
    @property
    def readers(self) -> Mapping[str, Reader]: ...
    @property
    def plugins(self) -> tuple[Entry, ...]: ...


def used(plan: Plan, registry: Registry) -> Used:
    """All plugins that a run uses, the readers that ``auto`` chooses among them.

    ``sha256`` is of the file in which the class is defined; None where there is no such file.
    """
    entries = [*plan.plugins, *_chosen_readers(plan, registry)]
    return {
        f"{entry.kind} {entry.full_name}": {
            "distribution": entry.distribution,
            "version": entry.version,
            "sha256": _file_hash(registry.load(entry)),
        }
        for entry in entries
    }


def _chosen_readers(plan: Plan, registry: Registry) -> list[Entry]:
    """For ``auto``, the entries of the readers that recognise the files."""
    if plan.config.data.reader.name != "auto":
        return []
    chosen = {type(reader_of(path, plan.readers)) for path in plan.config.data_paths if path is not None}
    return [entry for entry in registry.of_kind("reader") if _loads(entry, registry) in chosen]


def _loads(entry: Entry, registry: Registry) -> type | None:
    try:
        return registry.load(entry)
    except PluginError:
        return None  # broken, and so not the one that was chosen


def _file_hash(plugin: type) -> str | None:
    try:
        file = inspect.getfile(plugin)
    except (OSError, TypeError):  # typed into an interpreter
        return None
    return storage.sha256_of(file) if Path(file).is_file() else None


def changes(recorded: Used, events: Iterable[Mapping[str, Any]], now: Used) -> Changes:
    """What differs between the plugins that a run goes by (its record, and the changes accepted since) and those now.

    Observers do not count, because they change no result. Records of old name versions alone, and not the readers that
    ``auto`` chose; what they do not name is not compared.
    """
    before = dict(recorded)
    for event in events:
        if event["event"] == EVENT:
            before |= {name: change["new"] for name, change in event["plugins"].items()}
    partial = any(isinstance(entry, str) for entry in recorded.values())
    names = before.keys() if partial else before.keys() | now.keys()
    return {
        name: {"old": before.get(name), "new": now.get(name)}
        for name in sorted(names)
        if not name.startswith("observer ") and not _same(before.get(name), now.get(name))
    }


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, str):
        return new is not None and new["version"] == old
    return old == new


def refuse(directory: Path, changed: Changes) -> RunError:
    """The error that names every change and says how to go on."""
    listed = "; ".join(f"{name} {_in_words(change['old'], change['new'])}" for name, change in changed.items())
    return RunError(
        f"{directory}: plugins changed since this run was started: {listed}. Restore them or start a new run; "
        "--accept-plugin-change (from Python: accept_plugin_change=True) goes on with them as they are now"
    )


def _in_words(old: Any, new: Any) -> str:
    if old is None or new is None:
        return "was not used" if old is None else "is no longer used"
    version = old if isinstance(old, str) else old["version"]
    if version != new["version"]:
        return f"was version {version}, is {new['version']}"
    return f"is still version {version}, but its file is another: sha256 {_short(old)} before, {_short(new)} now"


def _short(entry: Mapping[str, Any]) -> str:
    return (entry["sha256"] or "unknown")[:12]

"""Which plugins are installed. One guarded load per entry point, so that a broken stranger cannot stop a run.

Everything here works without importing torch: a plugin's entry point registers names and "module:Class" targets; the
target is imported when a configuration names it or somebody asks to see it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pluggy
from pydantic import ValidationError

from moalign.api import (
    API_VERSION,
    ENTRY_POINT_GROUP,
    Combiner,
    Conditioner,
    Decoder,
    Filter,
    Objective,
    Observer,
    Plugin,
    Reader,
    Reference,
    Reward,
    RewardModel,
    Sampler,
    Search,
    Transform,
)
from moalign.calls import CONSTRUCTOR, IMPORT, Call, deaths, under_way
from moalign.door import Origin, described
from moalign.errors import ConfigError, MoalignError, PluginError, UnknownPluginError
from moalign.hooks import HookSpecifications, NewerAPIError, check, check_methods
from moalign.validation import explain, nearest

KINDS: Mapping[str, type[Plugin]] = {
    "objective": Objective,
    "combiner": Combiner,
    "reward": Reward,
    "transform": Transform,
    "search": Search,
    "reader": Reader,
    "observer": Observer,
    "sampler": Sampler,
    "decoder": Decoder,
    "conditioner": Conditioner,
    "reward-model": RewardModel,
    "reference": Reference,
    "filter": Filter,
}
LOAD_VARIABLE = "MOALIGN_LOAD_PLUGINS"
DISABLE_VARIABLE = "MOALIGN_DISABLE_PLUGINS"
DEADLINE_VARIABLE = "MOALIGN_IMPORT_DEADLINE"  # seconds, of modules and of the hooks that register plugins


HOOKS: Mapping[str, str] = {
    "objective": "register_objectives",
    "combiner": "register_combiners",
    "reward": "register_rewards",
    "transform": "register_transforms",
    "search": "register_searches",
    "reader": "register_readers",
    "observer": "register_observers",
    "sampler": "register_samplers",
    "decoder": "register_decoders",
    "conditioner": "register_conditioners",
    "reward-model": "register_reward_models",
    "reference": "register_references",
    "filter": "register_filters",
}


@dataclass(frozen=True)
class Entry:
    """One registered plugin and the distribution it came with."""

    kind: str
    name: str
    target: str | type[Plugin]
    summary: str
    paper: str
    distribution: str
    version: str

    @property
    def full_name(self) -> str:
        return f"{self.distribution}:{self.name}"


@dataclass(frozen=True)
class Broken:
    """An entry point that could not be loaded, or that registered something it must not: why, and how to mend it."""

    entry_point: str
    distribution: str
    version: str
    reason: str
    cure: str = ""


@dataclass(frozen=True)
class LeftOut:
    """A plugin, or an entry point that was not even imported, because somebody asked for that."""

    kind: str | None
    """None for an entry point"""
    name: str
    distribution: str
    version: str
    reason: str


@dataclass(frozen=True)
class Registry:
    """All that is installed and not disabled. A name that two distributions claim is written ``distribution:name``."""

    entries: tuple[Entry, ...]
    broken: tuple[Broken, ...] = ()
    disabled: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def of_kind(self, kind: str) -> list[Entry]:
        return sorted((entry for entry in self.entries if entry.kind == kind), key=lambda e: (e.name, e.distribution))

    def duplicates(self) -> list[tuple[Entry, ...]]:
        """Groups of entries that claim one name of one kind."""
        claims: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            claims.setdefault((entry.kind, entry.name), []).append(entry)
        return [tuple(group) for group in claims.values() if len(group) > 1]

    def find(self, kind: str, name: str) -> Entry:
        """The one plugin of this kind and name (``name`` or ``distribution:name``).

        Raises UnknownPluginError naming the nearest name, the distributions in conflict, or the broken distribution.
        """
        of_kind = self.of_kind(kind)
        matches = [entry for entry in of_kind if name in (entry.name, entry.full_name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            claims = " and ".join(f"{entry.distribution} {entry.version}" for entry in matches)
            choices = " or ".join(f"'{entry.full_name}'" for entry in matches)
            raise UnknownPluginError(f"{kind} '{name}' is claimed by {claims}; write {choices}")
        message = f"no {kind} is called '{name}'{nearest(name, (entry.name for entry in of_kind))}"
        if self.disabled:
            message += f" (disabled: {', '.join(self.disabled)})"
        for failure in self.broken:
            message += (
                f"\n  {failure.distribution} {failure.version} could not be loaded: {failure.reason}; {failure.cure}"
            )
        raise UnknownPluginError(message)

    def load(self, entry: Entry) -> type[Plugin]:
        """Import the class behind an entry. Raises PluginError naming plugin, distribution and version."""
        who = f"{entry.kind} '{entry.name}' of {entry.distribution} {entry.version}"
        target: Any = entry.target
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            try:
                with _importing(who, entry.distribution):
                    target = getattr(importlib.import_module(module), attribute)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit and what a stranger may derive from BaseException
                raise PluginError(f"{who} could not be imported from '{target}': {described(error)}") from error
        if not (isinstance(target, type) and issubclass(target, KINDS[entry.kind])):
            raise PluginError(f"{who}: {target!r} is not a subclass of moalign.api.{KINDS[entry.kind].__name__}")
        return target

    def build(
        self,
        kind: str,
        name: str,
        options: Mapping[str, Any],
        key: str,
        deadline: float | None = None,
        beside: Collection[str] = (),
    ) -> Any:
        """The plugin with its options validated; ``key`` is where the configuration names it, for messages, and
        ``beside`` what else is known there.

        ``deadline``: seconds that a call into it may take. What an option names whose field is of a kind, such as
        ``reward: Reward``, is built likewise.

        Raises UnknownPluginError, ConfigError (bad options, each key named; a library that it requires is not
        installed) or PluginError.
        """
        try:
            entry = self.find(kind, name)
        except UnknownPluginError as error:
            raise UnknownPluginError(f"{key}.name: {error}") from None
        plugin = self.load(entry)
        for module, install in plugin.requires.items():
            if importlib.util.find_spec(module) is None:
                raise ConfigError(f"{key}: {kind} '{name}' needs {module}, not installed; pip install '{install}'")
        origin = Origin(kind, entry.name, entry.distribution, entry.version, deadline)
        try:
            check_methods(plugin, KINDS[kind])
        except PluginError as error:
            raise PluginError(f"{origin.who}: {error}") from None
        for death in deaths():
            if death.call.dispensable == ("reader", origin.who):
                raise PluginError(death.reason)
        inner = {
            each.option: self.build(each.kind, each.name, each.options, f"{key}.{each.option}", deadline)
            for each in _inner(plugin, options, key)
        }
        try:
            with under_way(origin.call(CONSTRUCTOR)):
                built = plugin(**{**options, **inner})
        except ValidationError as error:
            raise ConfigError(explain(error, plugin, key, beside)) from None
        except (MoalignError, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit and what a stranger may derive from BaseException
            raise PluginError(f"{origin.who} could not be built: {described(error)}") from error
        built._origin = origin
        return built

    def named(self, kind: str, name: str, options: Mapping[str, Any]) -> Iterator[Entry]:
        """The plugin of this kind and name, and those that its options name."""
        entry = self.find(kind, name)
        yield entry
        for each in _inner(self.load(entry), options, kind):
            yield from self.named(each.kind, each.name, each.options)


@dataclass(frozen=True)
class _Inner:
    """A plugin that an option of another one names."""

    option: str
    kind: str
    name: str
    options: Mapping[str, Any]


def _inner(plugin: type[Plugin], options: Mapping[str, Any], key: str) -> Iterator[_Inner]:
    """Of the options whose field is of a kind, a name or a mapping with one; a plugin that is built already stays."""
    for option, field in plugin.model_fields.items():
        kind = next((kind for kind, base in KINDS.items() if field.annotation is base), None)
        if kind is None or option not in options or isinstance(options[option], Plugin):
            continue
        value = options[option]
        choice = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
        name = choice.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"{key}.{option}: name a {kind}, such as {{name: ..., option: value}}")
        yield _Inner(option, kind, name, choice)


def discover(no_plugin: Iterable[str] = (), entry_points: Iterable[metadata.EntryPoint] | None = None) -> Registry:
    """Load every entry point of the group ``moalign``, each in a guard of its own.

    MOALIGN_LOAD_PLUGINS (comma-separated distributions) restricts loading to those and the built-ins,
    MOALIGN_DISABLE_PLUGINS and ``no_plugin`` leave out distributions, or single plugins as ``name`` or
    ``distribution:name``. No exception of a plugin leaves this function; a name in ``no_plugin`` that
    nobody has raises UnknownPluginError.
    """
    _import_deadline()  # a bad one is the user's error, and no plugin's
    disabled = {name: f"--no-plugin {name}" for name in no_plugin}
    disabled |= {name: f"{DISABLE_VARIABLE} names it" for name in _names(os.environ.get(DISABLE_VARIABLE, ""))}
    points = list(metadata.entry_points(group=ENTRY_POINT_GROUP) if entry_points is None else entry_points)
    entries: list[Entry] = []
    broken: list[Broken] = []
    left_out: list[LeftOut] = []
    deadly = {each.call.dispensable: PluginError(each.reason) for each in deaths()}
    for point in sorted(points, key=lambda p: (p.value, p.name)):
        distribution, version = origin(point)
        reason = disabled.get(distribution) or reason_to_leave_out(distribution)
        if reason:
            left_out.append(LeftOut(None, point.name, distribution, version, reason))
            continue
        if death := deadly.get(("distribution", distribution)):
            broken.append(Broken(point.name, distribution, version, str(death), _cure(death, distribution)))
            continue
        try:
            with _importing(f"entry point '{point.name}' of {distribution} {version}", distribution):
                entries += _collect(point, distribution, version)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and what a stranger may derive from BaseException
            broken.append(Broken(point.name, distribution, version, described(error), _cure(error, distribution)))
    known = {entry.name for entry in entries} | {entry.full_name for entry in entries} | {origin(p)[0] for p in points}
    for name in sorted(set(no_plugin) - known):
        raise UnknownPluginError(f"--no-plugin {name}: there is no such plugin or distribution{nearest(name, known)}")
    kept: list[Entry] = []
    for entry in entries:
        reason = disabled.get(entry.name) or disabled.get(entry.full_name)
        if reason:
            left_out.append(LeftOut(entry.kind, entry.name, entry.distribution, entry.version, reason))
        else:
            kept.append(entry)
    return Registry(tuple(kept), tuple(broken), tuple(sorted(disabled)), tuple(left_out))


def _collect(point: metadata.EntryPoint, distribution: str, version: str) -> list[Entry]:
    """The entries of one entry point, through a plugin manager of its own. All of them or, by exception, none."""
    plugin = point.load()
    check(plugin)
    manager = pluggy.PluginManager("moalign")
    manager.add_hookspecs(HookSpecifications)
    manager.register(plugin, name=point.name)
    entries: list[Entry] = []
    for kind, hook in HOOKS.items():

        def register(name: str, target: str | type[Plugin], *, summary: str, paper: str = "", kind: str = kind) -> None:
            if not isinstance(name, str) or not name or ":" in name or name != name.strip():
                raise PluginError(f"{kind} name {name!r} is empty or has a colon or space at its edge")
            if any(entry.kind == kind and entry.name == name for entry in entries):
                raise PluginError(f"{kind} '{name}' is registered twice")
            if not isinstance(summary, str) or not summary.strip() or "\n" in summary:
                raise PluginError(f"the summary of {kind} '{name}' is {summary!r}; write one line of text")
            entries.append(Entry(kind, name, target, summary, paper, distribution, version))

        try:
            getattr(manager.hook, hook)(register=register)
        except Exception as error:
            raise PluginError(f"its hook `{hook}` raised {described(error)}") from error
    return entries


@contextmanager
def _importing(who: str, distribution: str) -> Iterator[None]:
    """What a module prints is no part of what a command prints, such as JSON."""
    with redirect_stdout(sys.stderr), under_way(Call(who, distribution, IMPORT, deadline=_import_deadline())):
        yield


def _import_deadline() -> float:
    value = os.environ.get(DEADLINE_VARIABLE, "60")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"{DEADLINE_VARIABLE} is {value!r}; write the seconds that importing a plugin may take")
    return seconds


def reason_to_leave_out(distribution: str) -> str | None:
    """Why the environment's variables keep a whole distribution from being imported; None where they do not."""
    if distribution in _names(os.environ.get(DISABLE_VARIABLE, "")):
        return f"{DISABLE_VARIABLE} names it"
    only = _names(os.environ.get(LOAD_VARIABLE, ""))
    return f"{LOAD_VARIABLE} does not name it" if only and distribution not in only | {"moalign"} else None


def origin(point: metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that an entry point came with."""
    dist = point.dist
    return (dist.name, dist.version) if dist is not None else (point.value.partition(":")[0], "unknown")


def _names(text: str) -> set[str]:
    return {part.strip() for part in text.split(",") if part.strip()}


def _cure(error: BaseException, distribution: str) -> str:
    """What whoever installed the distribution can do about it."""
    module = error.name if isinstance(error, ImportError) and error.name else ""
    if isinstance(error, NewerAPIError) or module.partition(".")[0] == "moalign":
        return f"upgrade moalign (its plugin API is {API_VERSION}), or install another version of {distribution}"
    if module and isinstance(error, ModuleNotFoundError):
        return (
            f"install the missing module '{module}', or everything anew: pip install --force-reinstall {distribution}"
        )
    return f"tell its author; until then {DISABLE_VARIABLE}={distribution} leaves it out"

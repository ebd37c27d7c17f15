"""Observers that are plugins: each is told everything in a guard of its own, so that none can harm the run."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moalign import api, calls, door
from moalign.registry import Entry
from moalign.sweeps import front
from moalign.sweeps.material import Material
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import Plan
from moalign.types import Candidate, Outcome, RunInfo


@contextmanager
def watched(plan: Plan, directory: Path, shown: Observer) -> Iterator[Observer]:
    """Whom the sweep tells: ``shown``, and behind it the observers of the configuration, closed in any case."""
    observer = PluginObservers(plan.observers, directory, shown)
    try:
        yield observer
    finally:
        observer.close()


class PluginObservers(Observer):
    """Tells ``shown`` as it is, and each plugin in a guard, with copies of its own.

    One that raises is reported through ``shown.on_warning`` with its name, distribution, version and hook, then closed,
    and hears no more.
    """

    def __init__(self, plugins: Sequence[tuple[Entry, api.Observer]], directory: Path, shown: Observer):
        self._plugins = plugins
        self._directory = directory
        self._shown = shown
        self._watchers: list[tuple[Entry, api.Observer, api.Watcher]] = []

    def on_phase(self, what: str) -> None:
        self._shown.on_phase(what)

    def on_warning(self, what: str) -> None:
        self._shown.on_warning(what)

    def on_run_start(self, plan: Plan, material: Material, finished: int) -> None:
        self._shown.on_run_start(plan, material, finished)
        identity = _identity(self._directory)
        ended = {death.call.dispensable for death in calls.deaths()}
        for entry, plugin in self._plugins:
            if ("observer", door.origin(plugin).who) in ended:
                continue
            config = plan.config.model_dump(mode="json")
            run = RunInfo(identity, self._directory.absolute(), config, plan.objectives, finished)
            try:
                watcher = door.call(plugin, "on_run_start", run)
                if not isinstance(watcher, api.Watcher):
                    raise TypeError(f"it returned {type(watcher).__name__}, not a moalign.api.Watcher")
            except Exception as error:
                self._report(entry, "on_run_start", error)
            else:
                self._watchers.append((entry, plugin, watcher))

    def on_skipped(self, outcomes: Sequence[Outcome]) -> None:
        self._shown.on_skipped(outcomes)

    def on_proposed(self, candidates: Sequence[Candidate]) -> None:
        self._shown.on_proposed(candidates)

    def on_candidate_start(self, candidate: Candidate) -> None:
        self._shown.on_candidate_start(candidate)

    def on_step(self, candidate: Candidate, step: int, metrics: dict[str, Any]) -> None:
        self._shown.on_step(candidate, step, metrics)
        self._tell("on_step", candidate, step, metrics)

    def on_candidate_end(self, outcome: Outcome) -> None:
        self._shown.on_candidate_end(outcome)
        self._tell("on_candidate_end", outcome)

    def on_run_end(self, front: dict[str, Any]) -> None:
        self._shown.on_run_end(front)
        self._tell("on_run_end", front)

    def close(self) -> None:
        """Close those that still watch."""
        self._tell("close")
        self._watchers.clear()

    def _tell(self, hook: str, *arguments: Any) -> None:
        for entry, plugin, watcher in list(self._watchers):
            try:
                door.call(plugin, hook, *copy.deepcopy(arguments), on=watcher)
            except Exception as error:
                self._watchers.remove((entry, plugin, watcher))
                self._report(entry, hook, error)
                if hook != "close":
                    with suppress(Exception):  # it has been reported already
                        door.call(plugin, "close", on=watcher)

    def _report(self, entry: Entry, hook: str, error: BaseException) -> None:
        self._shown.on_warning(
            f"observer '{entry.name}' of {entry.distribution} {entry.version} failed in {hook} and was switched off; "
            f"the run goes on: {door.described(error.__cause__ or error)}"
        )


def _identity(directory: Path) -> str:
    """The run's own, as ``run.json`` has it; a run that was begun before there was one goes by its place."""
    written = front.read_record(directory).get("id")
    return written or hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16]

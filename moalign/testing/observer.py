"""Whether an observer keeps to the contract of ``moalign.api.Observer``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moalign.api import Candidate, Observer, Outcome, Preference, RunInfo, Watcher
from moalign.testing.review import Review, run, short

EQUAL = Preference("weights", {"harmless": 0.5, "helpful": 0.5})
CANDIDATES = (Candidate("first", EQUAL), Candidate("second", EQUAL))
METRICS: dict[str, Any] = {"loss": 0.7, "gradient_norm": 1.5, "tokens": 64, "lr": 1e-3, "helpful/loss": 0.6}
NOT_FINITE: dict[str, Any] = {"loss": "nan", "gradient_norm": "inf", "tokens": 64, "lr": 1e-3, "skipped": "loss is nan"}
DONE = Outcome("first", "done", EQUAL, {"harmless": 0.4, "helpful": 0.6}, {"harmless": 0.01}, kl=1.5, tokens=128)
FAILED = Outcome("second", "failed", EQUAL, error="step 3: loss is nan")
FRONT: dict[str, Any] = {"points": [{"id": "first", "scores": {"harmless": 0.4, "helpful": 0.6}}], "hypervolume": 0.1}
SURVIVE = "take what a run may bring: figures that are text where they are not finite, failed candidates, any end"


def check_observer(plugin: Observer, *, exempt: Collection[str] = ()) -> None:
    """Have an observer watch short made-up runs in a temporary directory: whole, interrupted, resumed.

    What it writes elsewhere it does write; trackers should be given options that keep them offline. ``exempt``: names
    of checks to leave out. Raises ConformanceError.
    """
    with tempfile.TemporaryDirectory(prefix="moalign-observer-") as directory:
        run(CHECKS, Trial(Review("observer", plugin), plugin, Path(directory)), exempt)


@dataclass
class Trial:
    review: Review
    plugin: Observer
    directory: Path

    def start(self, name: str, finished: int = 0) -> Watcher:
        directory = self.directory / name
        directory.mkdir(exist_ok=True)
        info = RunInfo("0123456789abcdef", directory, {"seed": 0, "objectives": {}}, ("harmless", "helpful"), finished)
        tried = f"on_run_start of a run with {finished} finished candidates"
        watcher = self.review.call(
            tried, "open what is written to, and return a Watcher", self.plugin.on_run_start, info
        )
        change = "return an instance of moalign.api.Watcher, whose methods hear what happens"
        self.review.require(isinstance(watcher, Watcher), tried, short(watcher), change)
        return watcher

    def tell(self, method: Callable[..., Any], *arguments: Any) -> None:
        tried = f"{method.__name__}({', '.join(map(short, arguments))})"
        given = deepcopy(arguments)
        self.review.call(tried, SURVIVE, method, *given)
        change = "copy what is to be changed"
        self.review.require(given == arguments, tried, "an argument was changed during the call", change)

    def steps(self, watcher: Watcher) -> None:
        for step, metrics in enumerate((METRICS, NOT_FINITE, {})):
            for candidate in CANDIDATES:
                self.tell(watcher.on_step, candidate, step, metrics)


def a_whole_run_is_watched(t: Trial) -> None:
    watcher = t.start("whole")
    t.steps(watcher)
    for outcome in (DONE, FAILED):
        t.tell(watcher.on_candidate_end, outcome)
    t.tell(watcher.on_run_end, FRONT)
    t.tell(watcher.close)


def an_interrupted_run_is_closed_and_resumed(t: Trial) -> None:
    """Nothing but close after some steps; then the same directory again, with steps that come a second time."""
    watcher = t.start("interrupted")
    t.steps(watcher)
    t.tell(watcher.close)
    watcher = t.start("interrupted", finished=1)
    t.steps(watcher)
    t.tell(watcher.on_candidate_end, FAILED)
    t.tell(watcher.on_run_end, FRONT | {"points": []})
    t.tell(watcher.close)


def two_runs_do_not_meet(t: Trial) -> None:
    """One closed while the other goes on: state belongs to the watcher."""
    first, second = t.start("one"), t.start("other")
    t.steps(first)
    t.tell(first.close)
    t.steps(second)
    t.tell(second.close)


CHECKS: tuple[Callable[[Trial], None], ...] = (
    a_whole_run_is_watched,
    an_interrupted_run_is_closed_and_resumed,
    two_runs_do_not_meet,
)

"""Observers that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

from moalign.api import Candidate, Observer, Outcome, RunInfo, Watcher


class Quiet(Observer):
    """Right: what the others spoil."""

    def on_run_start(self, run: RunInfo) -> Watcher:
        return Watcher()


class HandsBackNothing(Observer):
    """Returns None."""

    def on_run_start(self, run: RunInfo) -> Watcher:
        return None  # type: ignore[return-value]


class FormatsTheLoss(Quiet):
    """Takes every loss for a number."""

    def on_run_start(self, run: RunInfo) -> Watcher:
        class Formatting(Watcher):
            def on_step(self, candidate: Candidate, step: int, metrics: Mapping[str, Any]) -> None:
                print(f"{metrics.get('loss', 0.0):.3f}", end="")

        return Formatting()


class ReadsEveryScore(Quiet):
    """Takes every outcome for a done one."""

    def on_run_start(self, run: RunInfo) -> Watcher:
        class Reading(Watcher):
            def on_candidate_end(self, outcome: Outcome) -> None:
                _ = outcome.scores["helpful"]

        return Reading()


class ChangesMetrics(Quiet):
    """Writes into what it is told."""

    def on_run_start(self, run: RunInfo) -> Watcher:
        class Writing(Watcher):
            def on_step(self, candidate: Candidate, step: int, metrics: Mapping[str, Any]) -> None:
                metrics["candidate"] = candidate.id  # type: ignore[index]

        return Writing()


class Reseeds(Quiet):
    """Seeds the global generator."""

    def on_run_start(self, run: RunInfo) -> Watcher:
        random.seed(0)
        return Watcher()


class StartsAnew(Quiet):
    """Insists on a file that is not there yet, so that no run can be resumed."""

    def on_run_start(self, run: RunInfo) -> Watcher:
        (run.directory / "events").open("x").close()
        return Watcher()


class OneForAll(Quiet):
    """Keeps its state with the class, where two runs meet."""

    open: ClassVar[set[str]] = set()

    def on_run_start(self, run: RunInfo) -> Watcher:
        self.open.add("events")

        class Shared(Watcher):
            def on_step(inner, candidate: Candidate, step: int, metrics: Mapping[str, Any]) -> None:
                if "events" not in OneForAll.open:
                    raise ValueError("I/O operation on closed file")

            def close(inner) -> None:
                OneForAll.open.clear()

        return Shared()


WRONG = {
    HandsBackNothing: r"got:\s+None",
    FormatsTheLoss: r"ValueError: .*format code",
    ReadsEveryScore: r"KeyError: 'helpful'",
    ChangesMetrics: r"an argument was changed",
    Reseeds: r"the global random state of random",
    StartsAnew: r"FileExistsError",
    OneForAll: r"closed file",
}


class CountsOnly(Quiet):
    """Right: keeps numbers in its watcher and writes nothing."""

    def on_run_start(self, run: RunInfo) -> Watcher:
        class Counting(Watcher):
            steps = 0

            def on_step(self, candidate: Candidate, step: int, metrics: Mapping[str, Any]) -> None:
                self.steps += 1

        return Counting()


UNUSUAL = [Quiet, CountsOnly]

"""Shows a sweep on the terminal: a bar with the time left, or plain lines where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moalign.sweeps.material import Material
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import Plan
from moalign.types import Candidate, Outcome

LINES_PER_CANDIDATE = 4  # without a terminal


class ConsoleObserver(Observer):
    """Prints phases, training progress and each candidate's scores."""

    def __init__(self, console: Console):
        self.console = console
        self._bar: Progress | None = None
        self._steps = 1
        self._expected = 0
        self._finished = 0
        self._planned: set[str] = set()  # candidates that are expected to be trained
        self._started = time.monotonic()
        self._here = 0
        self._steps_of: dict[str, int] = {}  # by candidate: a search may give one fewer steps than others
        self._share_done: dict[str, float] = {}  # by candidate; several may be under way

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_phase(self, what: str) -> None:
        self.console.print(f"[dim]{what} …[/]", highlight=False)

    def on_warning(self, what: str) -> None:
        self.console.print(f"[yellow]warning[/] {escape(what)}", highlight=False)

    def on_run_start(self, plan: Plan, material: Material, finished: int) -> None:
        self._planned = {candidate.id for candidate in plan.propose(()) if candidate.kind == "trained"}
        self._begin(material.counts, material.warnings, plan.config.train.steps, len(self._planned), finished)

    def on_training_start(self, counts: Mapping[str, int], warnings: Sequence[str], steps: int, members: int) -> None:
        self._begin(counts, warnings, steps, members, 0)

    def _begin(
        self, counts: Mapping[str, int], warnings: Sequence[str], steps: int, expected: int, finished: int
    ) -> None:
        for reason, count in sorted(counts.items()):
            self.console.print(f"  {reason}: {count}", highlight=False, markup=False)
        for warning in warnings:
            self.on_warning(warning)
        self._steps, self._finished, self._expected = steps, min(finished, expected), expected
        if finished:
            self.console.print(f"already there: {finished} candidate{'s' * (finished > 1)}", highlight=False)
        self._started = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "", total=self._expected * self._steps, completed=self._finished * self._steps
            )

    def on_skipped(self, outcomes: Sequence[Outcome]) -> None:
        dropped = self._planned.intersection(outcome.id for outcome in outcomes)
        self._planned -= dropped
        self._expected -= len(dropped)
        self._finished = min(self._finished, self._expected)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._completed(), total=self._total())

    def on_candidate_start(self, candidate: Candidate) -> None:
        self._steps_of[candidate.id] = candidate.changes.get("train.steps", self._steps)
        if self._bar is not None:
            self._bar.update(self._task, description=candidate.id)

    def on_step(self, candidate: Candidate, step: int, metrics: dict[str, Any]) -> None:
        if "skipped" in metrics:
            self.console.print(f"{candidate.id}: step {step} was skipped: {metrics['skipped']}", markup=False)
        steps = self._steps_of.get(candidate.id, self._steps)
        self._share_done[candidate.id] = (step + 1) / steps
        if self._bar is not None:
            self._bar.update(self._task, description=candidate.id, completed=self._completed())
        elif (step + 1) % max(1, steps // LINES_PER_CANDIDATE) == 0:
            loss = metrics.get("loss")
            shown = f", loss {loss:.4f}" if isinstance(loss, float) else ""
            self.console.print(f"{candidate.id}: step {step + 1} of {steps}{shown}{self._left()}", markup=False)

    def on_candidate_end(self, outcome: Outcome) -> None:
        if outcome.kind == "trained":  # others take no steps
            self._here += 1
            self._share_done[outcome.id] = 1.0
        if self._bar is not None:
            self._bar.update(self._task, completed=self._completed(), total=self._total())
        if outcome.status == "failed":
            self.console.print(f"[red]failed[/] {outcome.id}: ", end="")
            self.console.print(outcome.error, markup=False)
            return
        scores = ", ".join(f"{name} {score:.3f}" for name, score in outcome.scores.items())
        kl = "" if outcome.kl is None else f", KL {outcome.kl:.2f} nats"
        self.console.print(f"done   {outcome.id}: {scores}{kl}", highlight=False, markup=False)

    def on_run_end(self, front: dict[str, Any]) -> None:
        self.close()

    def _total(self) -> int:
        return max(self._expected, self._finished + self._here) * self._steps

    def _completed(self) -> int:
        """Steps, as if every candidate took the configuration's."""
        return round((self._finished + sum(self._share_done.values())) * self._steps)

    def _left(self) -> str:
        done = sum(self._share_done.values())
        remaining = self._expected - self._finished - done
        seconds = (time.monotonic() - self._started) / done * max(0.0, remaining)
        return f", about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

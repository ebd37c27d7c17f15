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
        self._expected = 0  # trainings, by what the search has proposed up to now
        self._of = ""  # what the time that is left is for
        self._started = time.monotonic()
        self._steps_of: dict[str, int] = {}  # by candidate: a search may give one fewer steps than others
        self._share_done: dict[str, float] = {}  # by candidate; several may be under way

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_phase(self, what: str) -> None:
        self.console.print(f"[dim]{escape(what)} …[/]", highlight=False, soft_wrap=True)

    def on_warning(self, what: str) -> None:
        self.console.print(f"[yellow]warning[/] {escape(what)}", highlight=False, soft_wrap=True)

    def on_run_start(self, plan: Plan, material: Material, finished: int) -> None:
        self._begin(material.counts, material.warnings, plan.config.train.steps)
        if finished:
            self.console.print(f"already there: {finished} candidate{'s' * (finished > 1)}", highlight=False)

    def on_training_start(self, counts: Mapping[str, int], warnings: Sequence[str], steps: int, members: int) -> None:
        self._begin(counts, warnings, steps)
        self._expect(members)

    def _begin(self, counts: Mapping[str, int], warnings: Sequence[str], steps: int) -> None:
        for reason, count in sorted(counts.items()):
            self.console.print(f"  {reason}: {count}", highlight=False, markup=False)
        for warning in warnings:
            self.on_warning(warning)
        self._steps, self._started = steps, time.monotonic()
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
            self._task = self._bar.add_task("", total=None)

    def on_proposed(self, candidates: Sequence[Candidate]) -> None:
        """A search may propose again, by what these reach: what comes after them nobody knows."""
        self._expect(sum(candidate.kind == "trained" for candidate in candidates))
        self._of = f" for the {self._expected} proposed so far"

    def _expect(self, more: int) -> None:
        self._expected += more
        if self._bar is not None:
            self._bar.update(self._task, total=self._expected * self._steps)

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
            self._say(f"{candidate.id}: step {step + 1} of {steps}{shown}{self._left()}")

    def on_candidate_end(self, outcome: Outcome) -> None:
        if outcome.kind == "trained":  # others take no steps
            self._share_done[outcome.id] = 1.0
        if self._bar is not None:
            self._bar.update(self._task, completed=self._completed())
        if outcome.status == "failed":
            self.console.print(f"[red]failed[/] {outcome.id}: ", end="")
            self.console.print(outcome.error, markup=False)
            return
        scores = ", ".join(f"{name} {score:.3f}" for name, score in outcome.scores.items())
        kl = "" if outcome.kl is None else f", KL {outcome.kl:.2f} nats"
        self._say(f"done   {outcome.id}: {scores}{kl}")

    def on_run_end(self, front: dict[str, Any]) -> None:
        self.close()

    def _say(self, what: str) -> None:
        """One line, however narrow the output is."""
        self.console.print(what, highlight=False, markup=False, soft_wrap=True)

    def _completed(self) -> int:
        """Steps, as if every candidate took the configuration's."""
        return round(sum(self._share_done.values()) * self._steps)

    def _left(self) -> str:
        done = sum(self._share_done.values())
        seconds = (time.monotonic() - self._started) / done * max(0.0, self._expected - done)
        return f", about {duration(seconds)} left{self._of}"


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

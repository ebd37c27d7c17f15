"""Curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from moalign.api import Candidate, Observer, Outcome, RunInfo, Watcher, figures, numbers

REGISTRATION = {
    "name": "tensorboard",
    "class": "TensorBoard",
    "summary": "event files for TensorBoard",
}


class TensorBoard(Observer):
    """Event files, one subfolder per candidate: ``tensorboard --logdir RUN/tensorboard``.

    Steps of a candidate that was under way before a resume are purged and written anew.
    """

    requires: ClassVar = {"tensorboard": "moalign[tensorboard]"}

    path: str = "tensorboard"
    """relative to the run directory, or absolute"""

    def on_run_start(self, run: RunInfo) -> EventFiles:
        return EventFiles(run.directory / self.path)


class EventFiles(Watcher):
    def __init__(self, directory: Path):
        self._directory = directory
        self._writers: dict[str, Any] = {}
        self._steps: dict[str, int] = {}

    def _writer(self, folder: str) -> Any:
        if folder not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[folder] = SummaryWriter(str(self._directory / folder), purge_step=0)
        return self._writers[folder]

    def on_step(self, candidate: Candidate, step: int, metrics: Mapping[str, Any]) -> None:
        writer = self._writer(candidate.id)
        for name, value in numbers(metrics).items():
            writer.add_scalar(name, value, step)
        self._steps[candidate.id] = step

    def on_candidate_end(self, outcome: Outcome) -> None:
        writer = self._writer(outcome.id)
        last = self._steps.get(outcome.id, 0)
        for name, value in figures(outcome).items():
            writer.add_scalar(f"outcome/{name}", value, last)
        shares = ", ".join(f"{name} {value:g}" for name, value in outcome.preference.values.items())
        writer.add_text("preference", f"{outcome.preference.kind}: {shares}", last)
        if outcome.error:
            writer.add_text("error", outcome.error, last)
        self._writers.pop(outcome.id).close()

    def on_run_end(self, front: Mapping[str, Any]) -> None:
        self._writer(".").add_scalar("front/hypervolume", front["hypervolume"], 0)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

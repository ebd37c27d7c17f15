"""trackio, through its own client."""

from __future__ import annotations

import contextvars
import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any, ClassVar

from moalign.api import Candidate, Observer, Outcome, Preference, RunInfo, Watcher, figures, numbers

REGISTRATION = {
    "name": "trackio",
    "class": "Trackio",
    "summary": "trackio, on this machine or in a Space",
}


class Trackio(Observer):
    """A run of trackio per candidate, all in one group: ``trackio show --project moalign``.

    Where it is kept is trackio's own setting (``TRACKIO_DIR``) unless ``space_id`` names a Space. After a resume the
    steps of candidates that were under way are in it twice.
    """

    requires: ClassVar = {"trackio": "moalign[trackio]"}

    project: str = "moalign"
    space_id: str | None = None
    """a Space on the hub instead of this machine"""

    def on_run_start(self, run: RunInfo) -> Runs:
        return Runs(self, run)


class Runs(Watcher):
    def __init__(self, options: Trackio, run: RunInfo):
        self._options = options
        self._run = run
        self._group = f"{run.directory.name}-{run.id[:6]}"
        self._open: dict[str, Any] = {}

    def _of(self, candidate: str, preference: Preference) -> Any:
        if candidate not in self._open:
            import trackio

            # init ends the run that it finds in its context; in a fresh one it finds none, so several stay open
            with redirect_stdout(io.StringIO()):
                self._open[candidate] = contextvars.Context().run(
                    trackio.init,
                    project=self._options.project,
                    space_id=self._options.space_id,
                    name=f"{self._group}-{candidate}",
                    group=self._group,
                    config={**self._run.config, "preference": dict(preference.values)},
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        return self._open[candidate]

    def on_step(self, candidate: Candidate, step: int, metrics: Mapping[str, Any]) -> None:
        self._of(candidate.id, candidate.preference).log(numbers(metrics), step=step)

    def on_candidate_end(self, outcome: Outcome) -> None:
        run = self._of(outcome.id, outcome.preference)
        run.log({f"outcome/{name}": value for name, value in figures(outcome).items()})
        del self._open[outcome.id]
        self._finish(run)

    def close(self) -> None:
        for run in self._open.values():
            self._finish(run)

    def _finish(self, run: Any) -> None:
        with redirect_stdout(io.StringIO()):
            run.finish()

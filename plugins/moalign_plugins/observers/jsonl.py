"""Every event of a run as a line of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moalign.api import Candidate, Observer, Outcome, RunInfo, Watcher

REGISTRATION = {
    "name": "jsonl",
    "class": "JSONL",
    "summary": "every event as a line of JSON, in the run directory",
}


class JSONL(Observer):
    """Lines of ``{"event": "run_start" | "step" | "candidate_end" | "run_end", "time": seconds since 1970, ...}``.

    A resumed run appends to the file; the steps of candidates that were under way are then in it twice.
    """

    path: str = "events.jsonl"
    """relative to the run directory, or absolute"""

    def on_run_start(self, run: RunInfo) -> Lines:
        lines = Lines(run.directory / self.path)
        lines.write("run_start", run=run.id, directory=str(run.directory), config=run.config, finished=run.finished)
        return lines


class Lines(Watcher):
    """Appends to one file, line by line, so that it can be followed while it grows."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if torn:  # killed in the middle of a line
            self._file.write("\n")

    def write(self, event: str, **content: Any) -> None:
        line = json.dumps({"event": event, "time": time.time()} | content, sort_keys=True, default=dict)
        self._file.write(line + "\n")

    def on_step(self, candidate: Candidate, step: int, metrics: Mapping[str, Any]) -> None:
        self.write("step", candidate=candidate.id, step=step, metrics=metrics)

    def on_candidate_end(self, outcome: Outcome) -> None:
        self.write("candidate_end", **asdict(outcome))

    def on_run_end(self, front: Mapping[str, Any]) -> None:
        self.write("run_end", front=front)

    def close(self) -> None:
        self._file.close()

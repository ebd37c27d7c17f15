"""Weights & Biases, through its own client."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from moalign.api import Candidate, Observer, Outcome, Preference, RunInfo, Watcher, figures, numbers

REGISTRATION = {
    "name": "wandb",
    "class": "WeightsAndBiases",
    "summary": "Weights & Biases, online or offline",
}


class WeightsAndBiases(Observer):
    """A run of W&B per candidate, all in one group, and one more for the front; a resume goes on with the same ones.

    Where it logs to and who you are come from W&B's own settings (``wandb login``, ``WANDB_*``).
    """

    requires: ClassVar = {"wandb": "moalign[wandb]"}

    project: str = "moalign"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None
    """W&B's own setting unless given; offline runs are kept in the run directory, for ``wandb sync``"""

    def on_run_start(self, run: RunInfo) -> Runs:
        return Runs(self, run)


class Runs(Watcher):
    def __init__(self, options: WeightsAndBiases, run: RunInfo):
        self._options = options
        self._run = run
        self._open: dict[str, Any] = {}

    def _init(self, name: str, identity: str, config: Mapping[str, Any]) -> Any:
        import wandb

        return wandb.init(
            project=self._options.project,
            entity=self._options.entity,
            mode=self._options.mode,
            dir=str(self._run.directory),
            group=f"{self._run.directory.name}-{self._run.id[:6]}",
            name=name,
            id=identity,
            config=dict(config),
            resume="allow",
            reinit="create_new",  # candidates that are trained together are all under way at once
        )

    def _of(self, candidate: str, preference: Preference, changes: Mapping[str, Any]) -> Any:
        if candidate not in self._open:
            identity = hashlib.sha256(f"{self._run.id}/{candidate}".encode()).hexdigest()[:16]
            own = {"preference": dict(preference.values), "changes": dict(changes)}
            self._open[candidate] = self._init(candidate, identity, {**self._run.config, **own})
        return self._open[candidate]

    def on_step(self, candidate: Candidate, step: int, metrics: Mapping[str, Any]) -> None:
        self._of(candidate.id, candidate.preference, candidate.changes).log(numbers(metrics), step=step)

    def on_candidate_end(self, outcome: Outcome) -> None:
        run = self._of(outcome.id, outcome.preference, outcome.changes)
        run.summary.update(figures(outcome) | {"status": outcome.status, "error": outcome.error})
        del self._open[outcome.id]
        run.finish(exit_code=0 if outcome.status == "done" else 1)

    def on_run_end(self, front: Mapping[str, Any]) -> None:
        import wandb

        names = [objective["name"] for objective in front["objectives"]]
        rows = [[p["id"], p["dominated"], p["kl"], *(p["scores"][name] for name in names)] for p in front["points"]]
        run = self._init("front", self._run.id, self._run.config)
        run.log({"points": wandb.Table(columns=["id", "dominated", "kl", *names], data=rows)})
        run.summary.update({"hypervolume": front["hypervolume"]})
        run.finish()

    def close(self) -> None:
        for run in self._open.values():  # interrupted
            run.finish(exit_code=1)

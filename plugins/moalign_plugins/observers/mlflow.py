"""MLflow, through its own client."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

from moalign.api import Candidate, Observer, Outcome, Preference, RunInfo, Watcher, figures, numbers

REGISTRATION = {
    "name": "mlflow",
    "class": "MLflow",
    "summary": "MLflow, one nested run per candidate",
}

AT_ONCE = 500  # metrics that are gathered before they are sent; a server takes at most 1,000 in one call
TAG = "moalign.run"


class MLflow(Observer):
    """A run of MLflow for the sweep and a nested one per candidate; a resume goes on with the same ones."""

    requires: ClassVar = {"mlflow": "moalign[mlflow]"}

    experiment: str = "moalign"
    tracking_uri: str | None = None
    """a server or database; MLflow's own setting (``MLFLOW_TRACKING_URI``) unless given"""

    def on_run_start(self, run: RunInfo) -> Runs:
        from mlflow import MlflowClient

        return Runs(MlflowClient(tracking_uri=self.tracking_uri), self.experiment, run)


class Runs(Watcher):
    def __init__(self, client: Any, experiment: str, run: RunInfo):
        self._client = client
        found = client.get_experiment_by_name(experiment)
        self._experiment = found.experiment_id if found else client.create_experiment(experiment)
        self._run = run
        self._ids: dict[str, str] = {}
        self._waiting: dict[str, list[Any]] = {}
        self._parent = self._begin(run.directory.name, run.id, {})
        client.set_tag(self._parent, "moalign.directory", str(run.directory))

    def _begin(self, name: str, key: str, tags: Mapping[str, str]) -> str:
        """The MLflow run with this key, opened again where there is one."""
        found = self._client.search_runs([self._experiment], filter_string=f"tags.`{TAG}` = '{key}'", max_results=1)
        if found:
            identity = found[0].info.run_id
            self._client.update_run(identity, status="RUNNING")
            return identity
        return self._client.create_run(self._experiment, run_name=name, tags={TAG: key, **tags}).info.run_id

    def _of(self, candidate: str, preference: Preference) -> str:
        if candidate not in self._ids:
            nested = {"mlflow.parentRunId": self._parent}
            identity = self._ids[candidate] = self._begin(candidate, f"{self._run.id}/{candidate}", nested)
            for name, value in preference.values.items():
                self._client.log_param(identity, f"{preference.kind}/{name}", value)
        return self._ids[candidate]

    def _log(self, identity: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        waiting = self._waiting.setdefault(identity, [])
        waiting += [Metric(name, value, now, step) for name, value in values.items()]
        if len(waiting) >= AT_ONCE:
            self._send(identity)

    def _send(self, identity: str) -> None:
        metrics = self._waiting.pop(identity, [])
        for start in range(0, len(metrics), AT_ONCE):
            self._client.log_batch(identity, metrics=metrics[start : start + AT_ONCE])

    def on_step(self, candidate: Candidate, step: int, metrics: Mapping[str, Any]) -> None:
        self._log(self._of(candidate.id, candidate.preference), numbers(metrics), step)

    def on_candidate_end(self, outcome: Outcome) -> None:
        identity = self._of(outcome.id, outcome.preference)
        self._log(identity, {f"outcome/{name}": value for name, value in figures(outcome).items()}, 0)
        self._send(identity)
        if outcome.error:
            self._client.set_tag(identity, "error", outcome.error)
        self._client.set_terminated(identity, "FINISHED" if outcome.status == "done" else "FAILED")
        del self._ids[outcome.id]

    def on_run_end(self, front: Mapping[str, Any]) -> None:
        self._client.log_metric(self._parent, "hypervolume", front["hypervolume"])
        self._client.set_terminated(self._parent, "FINISHED")
        self._parent = ""

    def close(self) -> None:
        for identity in self._ids.values():  # interrupted
            self._send(identity)
            self._client.set_terminated(identity, "KILLED")
        if self._parent:
            self._client.set_terminated(self._parent, "KILLED")

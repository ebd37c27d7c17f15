"""The observers that ship, each against its real library, never over a network; skipped where it is not installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moalign import registry
from moalign.api import Candidate, Outcome, Preference, RunInfo

BOTH = {"a": Preference("weights", {"x": 0.25, "y": 0.75}), "b": Preference("weights", {"x": 1.0, "y": 0.0})}


def watch(name: str, run: RunInfo, **options) -> None:
    """Two candidates under way at once, one of which fails, and the end of the run."""
    observer = registry.discover().build("observer", name, options, "observers.0")
    watcher = observer.on_run_start(run)
    for step in range(3):
        for identity, preference in BOTH.items():
            metrics = {"loss": len(identity) / (step + 1), "x/loss": float(step), "gradient_norm": "nan"}
            watcher.on_step(Candidate(identity, preference), step, metrics)
    watcher.on_candidate_end(
        Outcome("a", "done", BOTH["a"], {"x": 1.5, "y": 2.5}, kl=0.1, details={"lost to rank": 0.0})
    )
    watcher.on_candidate_end(Outcome("b", "failed", BOTH["b"], error="out of memory"))
    point = {"id": "a", "dominated": False, "kl": 0.1, "scores": {"x": 1.5, "y": 2.5}}
    objectives = [{"name": "x", "direction": "max"}, {"name": "y", "direction": "max"}]
    watcher.on_run_end({"objectives": objectives, "points": [point], "failed": [], "hypervolume": 3.5})
    watcher.close()


@pytest.fixture
def told(tmp_path) -> RunInfo:
    (tmp_path / "run").mkdir()
    return RunInfo("0123456789abcdef", tmp_path / "run", {"train": {"steps": 3}}, ("x", "y"))


def test_jsonl(told):
    watch("jsonl", told)
    file = told.directory / "events.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = ["run_start"] + ["step"] * 6 + ["candidate_end"] * 2 + ["run_end"]
    assert [line["event"] for line in lines] == kinds
    assert lines[1]["candidate"] == "a" and lines[1]["metrics"]["loss"] == 1.0
    assert lines[7]["scores"] == {"x": 1.5, "y": 2.5} and lines[8]["error"] == "out of memory"
    with file.open("a") as torn:
        torn.write('{"event": "st')
    watch("jsonl", told)
    lines = file.read_text().splitlines()
    assert len(lines) == 2 * len(kinds) + 1
    assert lines[len(kinds)] == '{"event": "st' and json.loads(lines[len(kinds) + 1])["event"] == "run_start"


def test_jsonl_elsewhere(told, tmp_path):
    watch("jsonl", told, path=str(tmp_path / "logs" / "x.jsonl"))
    assert (tmp_path / "logs" / "x.jsonl").exists() and list(told.directory.iterdir()) == []


def test_tensorboard(told):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch("tensorboard", told)
    watch("tensorboard", told)  # as after a resume: the steps come again
    folder = told.directory / "tensorboard"
    events = EventAccumulator(str(folder / "a")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(1 / (step + 1))) for step in range(3)
    ]
    assert events.Scalars("outcome/scores/y")[-1].value == 2.5
    assert EventAccumulator(str(folder)).Reload().Scalars("front/hypervolume")[-1].value == 3.5
    assert (folder / "b").is_dir()


def test_wandb_offline(told, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    begun = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: begun.append(init(**options)) or begun[-1])
    watch("wandb", told, mode="offline")
    assert [run.name for run in begun] == ["a", "b", "front"]
    assert {run.group for run in begun} == {"run-012345"} and len({run.id for run in begun}) == 3
    files = {
        run.id: next((told.directory / "wandb").glob(f"offline-run-*-{run.id}/run-{run.id}.wandb")) for run in begun
    }
    done, failed, front = (files[run.id].read_bytes() for run in begun)  # records with their keys and values as text
    assert b"gradient_norm" in done and b"scores/y" in done and b"2.5" in done
    assert b"out of memory" in failed and b"scores/y" not in failed
    assert b"hypervolume" in front and b"3.5" in front


def test_mlflow_files(told, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    watch("mlflow", told, tracking_uri=uri)
    watch("mlflow", told, tracking_uri=uri)  # goes on with the same runs
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("moalign").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"run", "a", "b"} and len(client.search_runs([experiment])) == 3
    assert runs["a"].data.tags["mlflow.parentRunId"] == runs["run"].info.run_id
    assert [run.info.status for run in (runs["run"], runs["a"], runs["b"])] == ["FINISHED", "FINISHED", "FAILED"]
    assert runs["run"].data.metrics["hypervolume"] == 3.5 and runs["a"].data.metrics["outcome/scores/y"] == 2.5
    history = client.get_metric_history(runs["b"].info.run_id, "loss")
    assert {(point.step, round(point.value, 6)) for point in history} == {(0, 1.0), (1, 0.5), (2, 0.333333)}


def test_trackio(told, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    import sqlite3

    watch("trackio", told)
    from trackio.utils import TRACKIO_DIR  # another test may have imported trackio before

    with sqlite3.connect(Path(TRACKIO_DIR) / "moalign.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    steps = [(name, step) for name, step, text in rows if "loss" in json.loads(text)]
    assert sorted(steps) == [(f"run-012345-{name}", step) for name in "ab" for step in range(3)]
    assert any(json.loads(text).get("outcome/scores/y") == 2.5 for _, _, text in rows)

"""The front of a run, derived from its journal alone; computing it twice gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moalign import pareto, preference, storage
from moalign.config import Config
from moalign.errors import RunError
from moalign.sweeps import journal, outcomes
from moalign.types import Outcome

FRONT = "front.json"
WORLD = "world.json"  # exact figures, where the world is known: see moalign.demo
EVALUATIONS = {
    "generate": "mean reward of responses sampled on held-out prompts",
    "preference": "share of held-out pairs whose better response the policy's implicit reward prefers (chance: 0.5)",
}


def compute(
    config: Config, kind: str, events: Sequence[dict[str, Any]], world: dict[str, Any] | None
) -> dict[str, Any]:
    """The content of ``front.json``. ``world`` replaces sampled scores by exact ones for the points it knows."""
    names = config.objective_names
    done = [outcome for outcome in outcomes.history(list(events), names) if outcome.status == "done"]
    failed = [outcome for outcome in outcomes.history(list(events), names) if outcome.status == "failed"]
    base = next(({"scores": e["scores"], "stderr": e["stderr"]} for e in events if e["event"] == "base"), None)
    points = [_point(outcome) for outcome in done]
    front: dict[str, Any] = {
        "objectives": [{"name": name, "direction": config.objectives[name].direction} for name in names],
        "evaluation": EVALUATIONS[kind],
    }
    if world is not None:
        for point in points:
            exact = world["points"].get(point["id"], {})
            point |= exact | {"details": point["details"] | exact.get("details", {})}
        base = world["base"]
        front |= world["front"]
    front["base"] = base
    front["failed"] = [{"id": outcome.id, "error": outcome.error} for outcome in failed]
    declared = config.evaluate.reference_point
    if isinstance(declared, dict):
        front["reference_point"] = dict(declared)
    elif base is not None:
        front["reference_point"] = dict(base["scores"])
    else:
        raise RunError("the untouched model was not measured yet; the run is not far enough to have a front")
    scores = np.array([[point["scores"][name] for name in names] for point in points]).reshape(-1, len(names))
    keep = pareto.non_dominated(scores) if len(points) else np.zeros(0, dtype=bool)
    for point, kept in zip(points, keep, strict=True):
        point["dominated"] = not bool(kept)
    front["hypervolume"] = pareto.hypervolume(scores, np.array([front["reference_point"][name] for name in names]))
    front["points"] = points
    return front


def _point(outcome: Outcome) -> dict[str, Any]:
    return {
        "id": outcome.id,
        "preference": preference.to_json(outcome.preference),
        "scores": dict(outcome.scores),
        "stderr": dict(outcome.stderr),
        "kl": outcome.kl,
        "kind": outcome.kind,
        "parents": dict(outcome.parents),
        "changes": dict(outcome.changes),
        "tokens": outcome.tokens,
        "details": dict(outcome.details),
    }


def read(run_directory: Path) -> dict[str, Any]:
    """Compute the front of a run directory from its record and journal."""
    record = read_record(run_directory)
    config = Config.model_validate(record["config"])
    world_file = run_directory / WORLD
    world = storage.read_json(world_file) if world_file.exists() else None
    return compute(config, record["evaluation"], journal.read(run_directory / journal.FILE), world)


def write(run_directory: Path) -> dict[str, Any]:
    """``read``, and keep it as ``front.json``."""
    front = read(run_directory)
    storage.write_json(run_directory / FRONT, front)
    return front


def read_record(run_directory: Path) -> dict[str, Any]:
    """``run.json`` of a run directory. Raises RunError where it is none."""
    if not (run_directory / "run.json").exists():
        raise RunError(f"{run_directory}: no run.json in it; this is not a run directory")
    record = storage.read_json(run_directory / "run.json")
    if not isinstance(record, dict) or "config" not in record:
        raise RunError(f"{run_directory / 'run.json'}: not the record of a run")
    return record

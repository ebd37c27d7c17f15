"""The front of a run, derived from its journal and its candidates' samples; computing it twice gives the same bytes."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from moalign import pareto, preference, storage
from moalign.config import Config
from moalign.errors import CorruptFileError, RunError
from moalign.sweeps import analysis, configurations, journal, optima, outcomes, samples
from moalign.sweeps.analysis import Price
from moalign.sweeps.optima import Sampled
from moalign.types import Outcome

FRONT = "front.json"
WORLD = "world.json"  # exact figures, where the world is known: see moalign.demo
EVALUATIONS = {
    "generate": "mean reward of responses sampled on held-out prompts",
    "preference": "share of held-out pairs whose better response the policy's implicit reward prefers (chance: 0.5)",
}
EXACT = ("scores", "stderr", "kl")  # what a known world says of a point, beside details


def compute(
    config: Config,
    kind: str,
    events: Sequence[dict[str, Any]],
    world: dict[str, Any] | None,
    kl_price: float = 0.0,
    sampled: Mapping[str | None, Sampled] | None = None,
) -> dict[str, Any]:
    """The content of ``front.json``. ``world`` replaces sampled scores by exact ones for the points it knows.

    ``kl_price``: what a nat of KL costs, see ``Plan.kl_price``. ``sampled``: responses of candidates and
    of the untouched base (None) to what is held out.
    """
    names = config.objective_names
    reached = outcomes.history(list(events), names)
    done = [outcome for outcome in reached if outcome.status == "done"]
    failed = [outcome for outcome in reached if outcome.status == "failed"]
    base = next(({"scores": e["scores"], "stderr": e["stderr"]} for e in events if e["event"] == "base"), None)
    points = [_point(outcome) for outcome in done]
    front: dict[str, Any] = {
        "objectives": [{"name": name, "direction": config.objectives[name].direction} for name in names],
        "evaluation": EVALUATIONS[kind],
    }
    if world is not None:
        for point in points:
            exact = world["points"].get(point["id"], {})
            point |= {key: exact[key] for key in EXACT if key in exact}
            point["details"] = point["details"] | exact.get("details", {})
        base = world["base"]
        front |= {key: value for key, value in world["front"].items() if key != "objectives"}
    front["base"] = base
    front["failed"] = [{"id": each.id, "error": each.error, "tokens": each.tokens} for each in failed]
    front["skipped"] = [outcome.id for outcome in reached if outcome.status == "skipped"]
    declared = config.evaluate.reference_point
    if isinstance(declared, dict):
        front["reference_point"] = dict(declared)
    elif base is not None:
        front["reference_point"] = dict(base["scores"])
    else:
        raise RunError("the untouched model was not measured yet; the run is not far enough to have a front")
    corner = [front["reference_point"][name] for name in names]
    front["hypervolume"] = pareto.hypervolume(analysis.table(points, names), corner)
    analysis.annotate(points, names, front["reference_point"])
    front["points"] = points
    price = _price(config, kind, world, kl_price)
    worth = dict(zip([one.id for one in done], analysis.values(points, names, price).tolist(), strict=True))
    if compared := configurations.compare(reached, worth, corner, config.seed):
        front["configurations"] = compared
    weights = {one.id: np.array(one.preference.vector(names)) for one in done if one.preference.kind == "weights"}
    known = {} if price.why else optima.bounds(weights, sampled or {}, price.value)
    front["analysis"] = analysis.analyse(front, price, known, sampled)
    return front


def _price(config: Config, kind: str, world: dict[str, Any] | None, kl_price: float) -> Price:
    """Of KL, or why nothing has one; exact figures of a known world have it paid."""
    paid = () if world is None else tuple(name for name, exact in world["points"].items() if "scores" in exact)
    if kind != "generate":
        return Price(why="the scores are no rewards, so nothing bounds what can be reached")
    if config.evaluate.temperature != 1.0:
        return Price(why="KL is measured at evaluate.temperature 1 alone")
    if kl_price <= 0:
        return Price(why="no price of KL is known; set evaluate.kl_price")
    if world is not None and world.get("kl_price", kl_price) != kl_price:
        return Price(why=f"the exact figures are for another price of KL, {world['kl_price']:.4g}")
    if world is not None and config.evaluate.prompts is not None:
        return Price(why="the exact figures are for other prompts than evaluate.prompts has left")
    return Price(kl_price, paid)


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
    """Compute the front of a run directory from its record and journal. Raises RunError, CorruptFileError."""
    record = read_record(run_directory)
    world_file = run_directory / WORLD
    world = storage.read_json(world_file) if world_file.exists() else None
    events = journal.of_run(run_directory)
    with as_written(run_directory):
        config, price = Config.model_validate(record["config"]), float(record.get("kl_price", 0.0))
        names = config.objective_names
        done = [outcome.id for outcome in outcomes.history(list(events), names) if outcome.status == "done"]
        sampled = optima.read(run_directory, done, names, samples.of_base(events)) if price > 0 else None
        return compute(config, record["evaluation"], events, world, price, sampled)


def write(run_directory: Path) -> dict[str, Any]:
    """``read``, and keep it as ``front.json``."""
    front = read(run_directory)
    storage.write_json(run_directory / FRONT, front)
    return front


def unfinished(run_directory: Path) -> str:
    """How to go on with a run that is not finished, for people; "" where it is."""
    if (run_directory / FRONT).exists() or journal.ended(run_directory / journal.FILE):
        return ""
    return f"unfinished; moalign resume {shlex.quote(str(run_directory))} goes on"


def read_record(run_directory: Path) -> dict[str, Any]:
    """``run.json`` of a run directory. Raises RunError where it is none."""
    if not (run_directory / "run.json").exists():
        raise RunError(f"{run_directory}: no run.json in it; this is not a run directory")
    record = storage.read_json(run_directory / "run.json")
    if not isinstance(record, dict) or "config" not in record:
        raise RunError(f"{run_directory / 'run.json'}: not the record of a run")
    return record


def read_config(run_directory: Path) -> Config:
    """The configuration in ``run.json``. Raises RunError where there is none, CorruptFileError where it is damaged."""
    record = read_record(run_directory)
    with as_written(run_directory):
        return Config.model_validate(record["config"])


@contextmanager
def as_written(run_directory: Path) -> Iterator[None]:
    """Raise CorruptFileError where what is read of a run directory has not the form in which it was written."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error.error_count()} bad keys" if isinstance(error, ValidationError) else repr(error)
        raise CorruptFileError(f"{run_directory}: record and journal are not those of a run: {what}") from None

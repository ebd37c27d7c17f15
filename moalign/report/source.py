"""What a report is drawn from: the files of a run directory, read and checked. Nothing else is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moalign import storage
from moalign.errors import CorruptFileError, MoalignError, RunError
from moalign.sweeps import journal


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Objective(_Part):
    name: str
    direction: Literal["max", "min"]


class _Preference(_Part):
    kind: Literal["weights", "direction", "thresholds"]
    values: dict[str, float]
    name: str | None = None


class _Measured(_Part):
    scores: dict[str, float]
    stderr: dict[str, float | None]


class _Point(_Measured):
    id: str
    preference: _Preference
    kl: float | None
    dominated: bool
    kind: str
    tokens: int
    details: dict[str, float | None]
    mixture_dominated: bool = False
    contribution: float | None = None
    alike: list[str] = []


class _Failure(_Part):
    id: str
    error: str


class _Ceiling(_Part):
    front_share: float | None = None
    front_share_worst: float | None = None


class _Optimum(_Part):
    weights: dict[str, float]
    scores: dict[str, float]


class _Next(_Part):
    preference: dict[str, float]
    gain_at_most: float | None
    tokens: float | None


class _Bounds(_Part):
    kl_price: float
    missing: list[str] = []
    front_share_at_least: float | None
    front_share_worst_at_least: float | None
    hypervolume_values: float
    hypervolume_mixtures: float | None
    hypervolume_at_most: float | None
    next: _Next


class _Analysis(_Part):
    expected_utility: float | None
    expected_utility_stderr: float | None
    sparsity: float | None
    igd_plus: float | None
    knee: str | None
    bounds: _Bounds | None
    unbounded: str | None


class _Front(_Part):
    objectives: list[_Objective]
    evaluation: str
    reference_point: dict[str, float]
    hypervolume: float
    base: _Measured | None
    points: list[_Point]
    failed: list[_Failure]
    front_share: float | None = None
    front_share_worst: float | None = None
    hypervolume_share: float | None = None
    ceiling: _Ceiling | None = None
    exact_front: list[_Optimum] | None = None
    skipped: list[str] = []
    analysis: _Analysis | None = None


@dataclass(frozen=True, slots=True)
class Metrics:
    """Training metrics of one candidate: one row per line of ``metrics.jsonl``, and how many lines were unreadable."""

    rows: tuple[Mapping[str, Any], ...] = ()
    unreadable: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """A run directory as a report sees it. ``notices`` say what was missing or damaged, in words."""

    front: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    events: tuple[Mapping[str, Any], ...] = ()
    metrics: Mapping[str, Metrics] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def read_source(run_directory: str | Path, given: Mapping[str, Any] | None = None) -> Source:
    """Read a run directory. RunError without a front; what else is missing or damaged becomes a notice.

    ``given``: the front, where it is not kept as ``front.json``.
    """
    run_directory = Path(run_directory)
    if given is None:
        front = read_front(run_directory)
    else:
        check_front(given, run_directory)
        front = dict(given)
    notices: list[str] = []
    run: dict[str, Any] = {}
    events: list[dict[str, Any]] = []
    try:
        run = dict(storage.read_json(run_directory / "run.json"))
    except (MoalignError, TypeError, ValueError) as error:
        notices.append(f"The configuration is not shown. {error}")
    try:
        events = journal.of_run(run_directory)
    except MoalignError as error:
        notices.append(f"The history is not shown. {error}")
    ids = [entry["id"] for entry in (*front["points"], *front["failed"])]
    metrics = {name: _read_metrics(run_directory / "candidates" / name) for name in ids if storage.safe_name(name)}
    for name, found in metrics.items():
        if found.unreadable:
            notices.append(f"{name}: {found.unreadable} unreadable lines in metrics.jsonl")
    return Source(front, run, tuple(events), metrics, tuple(notices))


def read_front(run_directory: str | Path) -> dict[str, Any]:
    """``front.json`` of a run directory, checked. RunError when there is none, CorruptFileError when it is no front."""
    path = Path(run_directory) / "front.json"
    if not path.is_file():
        raise RunError(f"{run_directory}: there is no front.json; finish the run first with `moalign resume`")
    front = storage.read_json(path)
    check_front(front, path)
    return front


def check_front(front: object, where: str | Path = "front") -> None:
    """Raise CorruptFileError naming the key unless ``front`` has the form of ``front.json``."""
    try:
        checked = _Front.model_validate(front)
    except ValidationError as error:
        finding = error.errors()[0]
        key = ".".join(map(str, finding["loc"])) or "front"
        raise CorruptFileError(f"{where}: {key}: {finding['msg'].lower()}") from error
    names = {objective.name for objective in checked.objectives}
    if not names or len(names) != len(checked.objectives):
        raise CorruptFileError(f"{where}: objectives: at least one, and no name twice")
    if set(checked.reference_point) != names:
        raise CorruptFileError(f"{where}: reference_point: exactly one number per objective")
    measured: list[_Measured | _Optimum | None] = [checked.base, *checked.points, *(checked.exact_front or [])]
    if any(item is not None and set(item.scores) != names for item in measured):
        raise CorruptFileError(f"{where}: a point does not have exactly one score per objective")


def _read_metrics(folder: Path) -> Metrics:
    path = folder / "metrics.jsonl"
    if path.is_symlink() or not path.is_file():
        return Metrics()
    rows, unreadable = [], 0
    for line in storage.read_bytes(path).splitlines():
        try:
            row = storage.parse_json(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            unreadable += 1
    return Metrics(tuple(rows), unreadable)

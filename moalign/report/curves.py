"""Training metrics as small curves, each a polyline in a box of 100 by 30 for inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 100.0, 30.0
MOST_POINTS = 200  # of one curve; more steps are drawn as means of neighbours


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps. ``lines`` are SVG point lists, broken where the value was not a number."""

    name: str
    lines: tuple[str, ...]
    first: float
    last: float
    lowest: float
    highest: float
    missing: int


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """A curve for every key that holds numbers in any row, the position along x being the row's ``step``."""
    names = sorted({name for row in rows for name, value in row.items() if name != "step" and _is_number(value)})
    return [_curve(name, rows) for name in names]


def _curve(name: str, rows: Sequence[Mapping[str, Any]]) -> Curve:
    steps = [row["step"] if _is_number(row.get("step")) else index for index, row in enumerate(rows)]
    present = [(step, row[name]) for step, row in zip(steps, rows, strict=True) if _is_number(row.get(name))]
    values = [value for _, value in present]
    missing = sum(name in row and not _is_number(row[name]) for row in rows)
    runs = _runs([(step, row.get(name)) for step, row in zip(steps, rows, strict=True) if name in row])
    frame = (min(steps), max(steps), min(values), max(values))
    stride = math.ceil(len(present) / MOST_POINTS)
    lines = tuple(_points(_thinned(run, stride), frame) for run in runs)
    return Curve(name, lines, values[0], values[-1], frame[2], frame[3], missing)


def _runs(pairs: Sequence[tuple[float, Any]]) -> list[list[tuple[float, float]]]:
    """Stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for step, value in pairs:
        if _is_number(value):
            runs[-1].append((step, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(run: list[tuple[float, float]], stride: int) -> list[tuple[float, float]]:
    parts = [run[start : start + stride] for start in range(0, len(run), stride)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _points(run: list[tuple[float, float]], frame: tuple[float, float, float, float]) -> str:
    left, right, bottom, top = frame
    run = run * 2 if len(run) == 1 else run  # a line needs two ends; round caps make this one a dot
    across = [WIDTH * ((x - left) / (right - left) if right > left else 0.5) for x, _ in run]
    down = [HEIGHT * (1 - ((y - bottom) / (top - bottom) if top > bottom else 0.5)) for _, y in run]
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in zip(across, down, strict=True))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300

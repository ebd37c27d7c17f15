"""What runs attain, as a picture: the surfaces of every, half of and any of them, between all their points."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moalign import storage
from moalign.report import wording
from moalign.report.picture import DASHED, DPI, EXACT, FAINT, FRONT, STYLE

LEVELS = {"worst": (FAINT, "-"), "median": (FRONT, "-"), "best": (EXACT, DASHED)}
TITLES = {"worst": "attained by every run", "median": "by half of them", "best": "by any"}


def draw(found: Mapping[str, Any], fronts: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw a comparison of runs with two objectives as a PNG; the same runs give the same bytes. Raises RunError."""
    across, up = found["objectives"]
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(7.2, 5.6), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        scores = [point["scores"] for front in fronts.values() for point in front["points"]]
        lows = [min(each[objective["name"]] for each in scores) for objective in (across, up)]
        highs = [max(each[objective["name"]] for each in scores) for objective in (across, up)]
        edges = [low - 0.05 * (high - low or 1.0) for low, high in zip(lows, highs, strict=True)]
        for level, (colour, style) in LEVELS.items():
            line = _staircase(found["attainment"][level], edges)
            axes.plot(*zip(*line, strict=True), linestyle=style, color=colour, linewidth=1.6, label=TITLES[level])
        places = [(each[across["name"]], each[up["name"]]) for each in scores]
        axes.plot(*zip(*places, strict=True), "o", markersize=3.5, color=FRONT, alpha=0.4)
        axes.set_xlabel(wording.objective_title(across, 48))
        axes.set_ylabel(wording.objective_title(up, 40))
        axes.set_title(f"Attained by {len(fronts)} runs", loc="left", fontsize=12, fontweight="bold")
        axes.legend(fontsize=8.5)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
    storage.write_bytes(path, image.getvalue())


def _staircase(points: Sequence[Sequence[float]], edges: Sequence[float]) -> list[tuple[float, float]]:
    """The border of all that is no better than one of the points, from the left edge to the lower one."""
    line: list[tuple[float, float]] = []
    left = edges[0]
    for right, top in sorted((float(x), float(y)) for x, y in points):
        line += [(left, top), (right, top)]
        left = right
    return [*line, (left, edges[1])]

"""The front as a picture: one panel for two objectives, a matrix of pairs for more, a row of values for one."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from moalign import storage
from moalign.report import wording
from moalign.report.labels import Box, place
from moalign.report.source import check_front

DPI = 160
HEADER = 0.45  # inches kept free for the title
FRONT, EXACT, BASE, FAINT, INK = "#4f46e5", "#f59e0b", "#111827", "#9ca3af", "#374151"
Errors = tuple[float | None, float | None]
DASHED = (0, (4, 3))
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#eef0f3",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # an objective may be called "a$b$"
    "legend.frameon": False,
}


def draw(front: Mapping[str, Any], path: str | Path) -> None:
    """Draw the content of ``front.json`` as a PNG; equal fronts give equal bytes. Raises CorruptFileError, RunError."""
    check_front(front)
    with matplotlib.style.context(["default", STYLE]):
        figure = _figure(front)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=DPI, metadata={"Software": None})
    storage.write_bytes(path, image.getvalue())


def _figure(front: Mapping[str, Any]) -> Figure:
    count = len(front["objectives"])
    if count == 1:
        return _row(front)
    return _panel(front) if count == 2 else _matrix(front)


# --- one, two, many objectives --------------------------------------------------------------------------------------


def _row(front: Mapping[str, Any]) -> Figure:
    points = front["points"]
    figure, (axes,) = _canvas(7.2, 2.2 + 0.3 * max(len(points), 2), 1)
    (name,) = wording.objective_names(front)
    for height, point in enumerate(reversed(points)):
        _mark(axes, point, (point["scores"][name], height), (point["stderr"].get(name), None), 6.5)
    if front["base"] is not None:
        axes.axvline(front["base"]["scores"][name], color=BASE, linewidth=1, linestyle=DASHED)
    ids = [wording.printable(point["id"], 20) for point in reversed(points)]
    axes.set_yticks(range(len(points)), ids)
    axes.set_ylim(-0.7, max(len(points), 1) - 0.3)
    axes.set_xlabel(wording.objective_title(front["objectives"][0], 48))
    _arrange(figure, front, [axes])
    _header(figure, front)
    return figure


def _panel(front: Mapping[str, Any]) -> Figure:
    figure, (axes,) = _canvas(7.2, 5.6, 1)
    first, second = front["objectives"]
    _shade(axes, front)
    _scatter(axes, front, first["name"], second["name"])
    _connect(axes, front, first["name"], second["name"])
    axes.set_xlabel(wording.objective_title(first, 48))
    axes.set_ylabel(wording.objective_title(second, 40))
    _arrange(figure, front, [axes])
    names = [first["name"], second["name"]]
    labels = [wording.preference_label(point["preference"], names) for point in front["points"]]
    _header(figure, front, _label(axes, front, names, labels))
    return figure


def _matrix(front: Mapping[str, Any]) -> Figure:
    """Every pair of objectives in the lower triangle; the numbers of the points are explained in the upper one."""
    objectives = front["objectives"]
    side = len(objectives) - 1
    size = max(2.2 * side, 7.2)
    figure, panels = _canvas(size, 0.9 * size + 0.6, side)
    used = []
    for index, axes in enumerate(panels):
        row, column = divmod(index, side)
        if column > row:
            axes.set_axis_off()
            continue
        across, up = objectives[column], objectives[row + 1]
        _scatter(axes, front, across["name"], up["name"], size=5)
        if row == side - 1:
            axes.set_xlabel(wording.objective_title(across, 16), fontsize=8.5)
        if column == 0:
            axes.set_ylabel(wording.objective_title(up, 16), fontsize=8.5)
        axes.locator_params(nbins=4)
        used.append((axes, [across["name"], up["name"]]))
    _arrange(figure, front, [axes for axes, _ in used])
    numbers = [str(index) for index in range(1, len(front["points"]) + 1)]
    _header(figure, front, sum(_label(axes, front, names, numbers) for axes, names in used))
    _key(panels, side, front)
    return figure


# --- what is drawn --------------------------------------------------------------------------------------------------


def _scatter(axes: Axes, front: Mapping[str, Any], across: str, up: str, size: float = 6.5) -> None:
    for point in sorted(front["points"], key=lambda point: not point["dominated"]):
        errors = (point["stderr"].get(across), point["stderr"].get(up))
        _mark(axes, point, (point["scores"][across], point["scores"][up]), errors, size)
    if front["base"] is not None:
        scores = front["base"]["scores"]
        axes.plot(scores[across], scores[up], "D", color=BASE, markersize=size - 0.5, zorder=4)
    axes.margins(0.12)


def _mark(axes: Axes, point: Mapping[str, Any], at: tuple[float, float], errors: Errors, size: float) -> None:
    colour = FAINT if point["dominated"] else FRONT
    xerr, yerr = (error or None for error in errors)
    axes.errorbar(
        at[0], at[1], xerr=xerr, yerr=yerr, fmt="none", ecolor=colour, elinewidth=1, capsize=2, alpha=0.55, zorder=2
    )
    face = "white" if point["dominated"] else colour
    shape = "s" if point["kind"] == "mixed" else "o"
    axes.plot(
        at[0],
        at[1],
        shape,
        markersize=size,
        markerfacecolor=face,
        markeredgecolor=colour,
        markeredgewidth=1.4,
        zorder=5,
    )


def _connect(axes: Axes, front: Mapping[str, Any], across: str, up: str) -> None:
    """The line through the points of the front, and the best that is possible where it is known."""
    for points, colour, style, width in (
        (front.get("exact_front") or [], EXACT, "-", 1.6),
        ([point for point in front["points"] if not point["dominated"]], FRONT, "-", 1.3),
    ):
        line = sorted((point["scores"][across], point["scores"][up]) for point in points)
        if len(line) > 1:
            axes.plot(*zip(*line, strict=True), style, color=colour, linewidth=width, zorder=3, solid_joinstyle="round")


def _shade(axes: Axes, front: Mapping[str, Any]) -> None:
    """The area that the hypervolume measures."""
    names = wording.objective_names(front)
    corner = [front["reference_point"][name] for name in names]
    steps = sorted(
        (tuple(point["scores"][name] for name in names) for point in front["points"] if not point["dominated"]),
        reverse=True,
    )
    steps = [step for step in steps if step[0] > corner[0] and step[1] > corner[1]]
    for (right, top), left in zip(steps, [*(step[0] for step in steps[1:]), corner[0]], strict=False):
        patch = Rectangle((left, corner[1]), right - left, top - corner[1], facecolor=FRONT, alpha=0.06, linewidth=0)
        axes.add_artist(patch)  # unlike add_patch it leaves the limits alone: the reference point may be far away


def _key(panels: Sequence[Axes], side: int, front: Mapping[str, Any]) -> None:
    """Which number stands for which preference, in the empty corner: ``side // 2`` rows high and the rest wide."""
    names = wording.objective_names(front)
    lines = [" / ".join(wording.printable(name, 12) for name in names)]
    for index, point in enumerate(front["points"], start=1):
        lines.append(f"{index:>2}   {wording.preference_text(point['preference'], names)}")
    left, lower = panels[side // 2].get_window_extent(), panels[(side // 2 - 1) * side].get_window_extent()
    corner = panels[side - 1].get_window_extent()
    size = 7.5
    room = int((corner.y1 - lower.y0) / DPI * 72 / (size * 1.6))
    if len(lines) > room:
        lines = [*lines[: room - 1], f"and {len(lines) - room + 1} more, see the table"]
    text = panels[side - 1].text(1, 1, "\n".join(lines), ha="right", va="top", fontsize=size, linespacing=1.5)
    text.set_transform(panels[side - 1].transAxes)
    text.set_fontsize(size * min(1.0, (corner.x1 - left.x0) / text.get_window_extent().width))


# --- around it ------------------------------------------------------------------------------------------------------


def _canvas(width: float, height: float, side: int) -> tuple[Figure, list[Axes]]:
    layout = ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.99 - HEADER / height))
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(side, side, squeeze=False, sharex="col" if side > 1 else False)
    return figure, list(panels.flat)


def _arrange(figure: Figure, front: Mapping[str, Any], used: Sequence[Axes]) -> None:
    """The legend; then the layout is settled and frozen, so that what follows can measure it."""
    handles = list(_legend(front))
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8.5, handletextpad=0.5)
    if not front["points"]:
        for axes in used:
            axes.text(0.5, 0.5, "no candidate finished", ha="center", va="center", transform=axes.transAxes)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _header(figure: Figure, front: Mapping[str, Any], missing: int = 0) -> None:
    """Title and figures; ``missing`` labels found no room, which is said."""
    # where the exact front is known, the volume says little; it stays in the table
    facts = wording.known_world(front) or [f"hypervolume {wording.number(front['hypervolume'])}"]
    if front["failed"]:
        facts.append(f"{len(front['failed'])} failed")
    if missing:
        facts.append(f"{missing} labels left out")
    height = 1 - 0.16 / figure.get_figheight()
    figure.text(0.02, height, "Pareto front", va="top", fontsize=12, fontweight="bold")
    figure.text(0.98, height, "  ·  ".join(facts), ha="right", va="top", fontsize=9)


def _legend(front: Mapping[str, Any]) -> Iterable[Line2D]:
    def mark(label: str, shape: str, face: str, edge: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=shape, markerfacecolor=face, markeredgecolor=edge, label=label)

    points = front["points"]
    if any(not point["dominated"] for point in points):
        yield mark("on the front", "o", FRONT, FRONT)
    if any(point["dominated"] for point in points):
        yield mark("dominated", "o", "white", FAINT)
    if any(point["kind"] == "mixed" for point in points):
        yield mark("mixed", "s", "white", INK)
    if front["base"] is not None:
        if len(front["objectives"]) == 1:
            yield Line2D([], [], color=BASE, linewidth=1, linestyle=DASHED, label="untouched model")
        else:
            yield mark("untouched model", "D", BASE, BASE)
    if front.get("exact_front") and len(front["objectives"]) == 2:
        yield Line2D([], [], color=EXACT, label="best possible")


def _label(axes: Axes, front: Mapping[str, Any], names: Sequence[str], texts: Sequence[str]) -> int:
    """Write one text beside each point, where it covers nothing; returns how many found no room."""
    across, up = names
    order = sorted(range(len(texts)), key=lambda index: front["points"][index]["dominated"])  # the front has precedence
    measured = [front["points"][index]["scores"] for index in order]
    if not measured:
        return 0
    base = [] if front["base"] is None else [front["base"]["scores"]]
    places = axes.transData.transform([(scores[across], scores[up]) for scores in (*measured, *base)])
    drawn = [axes.text(0, 0, texts[index], fontsize=8, ha="center", va="center", zorder=6) for index in order]
    frame = axes.get_window_extent()
    centres = place(
        [(x, y) for x, y in places[: len(order)]],
        [_size(text.get_window_extent()) for text in drawn],
        Box(frame.x0 + 2, frame.y0 + 2, frame.x1 - 2, frame.y1 - 2),
        [_around(x, y) for x, y in places],
        _along_lines(axes),
        DPI / 100,
    )
    for text, centre in zip(drawn, centres, strict=True):
        if centre is None:
            text.remove()
        else:
            x, y = axes.transData.inverted().transform(centre)
            text.set_position((x, y))
    return centres.count(None)


def _along_lines(axes: Axes) -> list[tuple[float, float]]:
    """Places along the drawn lines, in pixels, a few pixels apart."""
    places: list[tuple[float, float]] = []
    paths = [np.asarray(line.get_xydata()) for line in axes.get_lines()]
    for bars in axes.collections:
        paths += bars.get_segments() if isinstance(bars, LineCollection) else []
    for path in paths:
        path = axes.transData.transform(path)
        for start, end in pairwise(path):
            steps = int(np.clip(np.hypot(*(end - start)) / 6, 1, 400))
            places += [tuple(start + (end - start) * i / steps) for i in range(steps + 1)]
    return places


def _around(x: float, y: float) -> Box:
    radius = 6 * DPI / 100
    return Box(x - radius, y - radius, x + radius, y + radius)


def _size(extent: Bbox) -> tuple[float, float]:
    return extent.width + 6, extent.height + 4

"""What was found, world by world: a row for each method and search, and a picture of shares against tokens."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.front_quality_run import REPLY, WORLDS, ways
from moalign import storage
from moalign.demo import job

Found = Mapping[str, Any]
TITLES = {
    "two": "Two objectives: helpful and harmless",
    "three": "Three objectives: helpful, harmless and concise",
    REPLY: "What a reply is worth: brilliant and impeccable, three targets",
}
OBJECTIVES = {
    "two": ("harmless", "helpful"),
    "three": ("concise", "harmless", "helpful"),
    REPLY: ("brilliant", "impeccable"),
}


@dataclass(frozen=True)
class Ceiling:
    """What gradient ascent on the exact figures reaches with the same adapters and so many ``points``: the mean share
    and the worst."""

    share: float
    worst: float
    points: int


def ceiling_of(world: str) -> Ceiling | None:
    """The shipped one; None where there is none."""
    shares = ("share", "share_worst") if world == REPLY else ("front_share", "front_share_worst")
    for each in storage.read_json(job.CEILING):
        if sorted(each["objectives"]) == sorted(OBJECTIVES[world]) and set(shares) <= set(each):
            mean, worst = (each[name] for name in shares)
            return Ceiling(mean, worst, len(each["points"]))
    return None


def tables_of(report: Mapping[str, Any]) -> list[tables.Table]:
    """A table for each world and each set of further changes."""
    made = []
    for world in WORLDS:
        of_world = [found for found in report["results"] if found["world"] == world]
        for further in dict.fromkeys(tuple(found["further"]) for found in of_world):
            founds = [found for found in of_world if tuple(found["further"]) == further]
            title = TITLES[world] + "".join(f", {change}" for change in further)
            made.append(_table(title, founds, ceiling_of(world), _not_run(report, world)))
    return made


def cells(results: Sequence[Found]) -> dict[tuple[str, str], list[Found]]:
    """(method, search) -> its results by seed, in the order of the file; what the file no longer has comes last."""
    order = {kind: {name: place for place, name in enumerate(ways()[kind])} for kind in ("methods", "searches")}
    pairs = dict.fromkeys((found["method"], found["search"]) for found in results)
    ordered = sorted(pairs, key=lambda pair: (order["methods"].get(pair[0], 999), order["searches"].get(pair[1], 999)))
    return {
        pair: sorted(
            (found for found in results if (found["method"], found["search"]) == pair), key=lambda one: one["seed"]
        )
        for pair in ordered
    }


def _table(title: str, results: Sequence[Found], ceiling: Ceiling | None, not_run: Sequence[str]) -> tables.Table:
    rows = [
        [f"{method}: {search}", *_row(founds, results, ceiling)] for (method, search), founds in cells(results).items()
    ]
    columns = [
        "method: search",
        "front share",
        "of the ceiling's",
        "worst preference",
        "of the ceiling's front share",
        "hypervolume share",
        "trained + others",
        "thousand tokens",
        "of the grid's, same seeds",
        "search's share of the time, %",
        "bounds hold",
        "seeds",
    ]
    notes = [
        f"Ceiling of {ceiling.points} points: {ceiling.share:.3f}, worst {ceiling.worst:.3f}."
        if ceiling
        else "No ceiling is known."
    ]
    failed = {name: error for found in results for name, error in found["failed"].items()}
    notes += [f"Candidate {name} failed: {error}" for name, error in sorted(failed.items())]
    return tables.Table(title, columns, rows, [*notes, *not_run])


def _row(founds: Sequence[Found], results: Sequence[Found], ceiling: Ceiling | None) -> list[tables.Cell]:
    shares = [found["front_share"] for found in founds]
    worst = [found["front_share_worst"] for found in founds]
    volumes = [found["hypervolume_share"] for found in founds if found["hypervolume_share"] is not None]
    trained = statistics.mean(sum(point["kind"] == "trained" for point in found["points"]) for found in founds)
    points = statistics.mean(len(found["points"]) for found in founds)
    ratios = [ratio for found in founds if (ratio := of_the_grid(found, results)) is not None]
    held = [holds for found in founds for holds in found["bounds_hold"].values()]
    return [
        tables.mean(shares),
        tables.mean([share / ceiling.share for share in shares]) if ceiling else "",
        tables.mean(worst),
        tables.mean([share / ceiling.share for share in worst]) if ceiling else "",
        tables.mean(volumes) if volumes else "",
        f"{trained:.3g} + {points - trained:.3g}",
        f"{statistics.mean(found['tokens'] for found in founds) / 1000:,.0f}",
        f"{statistics.mean(ratios):.2f}" if ratios else "",
        f"{100 * max(found['proposing_seconds'] / found['seconds'] for found in founds):.2f}",
        f"{sum(held)} of {len(held)}" if held else "none stated",
        str(len(founds)),
    ]


def of_the_grid(found: Found, results: Sequence[Found]) -> float | None:
    """Tokens relative to those of the file's first search, with the same method and seed; None where it was not run."""
    first = next(iter(ways()["searches"]))
    same = ("world", "method", "seed", "further")
    for other in results:
        if other["search"] == first and all(other[name] == found[name] for name in same):
            return found["tokens"] / other["tokens"]
    return None


def _not_run(report: Mapping[str, Any], world: str) -> list[str]:
    """Reasons, each with what it keeps from running."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.get("not_run", {}).items():
        if name.startswith(f"{world}: "):
            by_reason.setdefault(reason, []).append(name.removeprefix(f"{world}: "))
    return [f"Not run, {reason}: {'; '.join(names)}." for reason, names in by_reason.items()]


def text_of(report: Mapping[str, Any]) -> str:
    about = [
        "Front share: of what the best policy gains over the base, how much the best point of the front gains; mean "
        "over even preferences, and the least (worst preference), by enumeration of every reply to the held-out "
        "prompts. Where a reply has a worth of its own: of what the best policy gains in E[min_j r_j / t_j] - beta KL, "
        "how much the best point gains, mean and least over three targets. The ceiling is what gradient ascent on "
        "these very figures reaches with the same adapters. Tokens: of responses, over all trainings of the sweep. The "
        "search's share of the time is the largest over the seeds, the core's checks of what it proposes among it. "
        "Bounds: the front share is at least, the hypervolume of the exact front at most what the front states. "
        "±: standard deviation over the seeds.",
    ]
    return tables.markdown("Searches and methods beside the best front", report, about, tables_of(report))


def draw(results: Sequence[Found], file: Path) -> None:
    """Front share against training tokens, a panel for each world; colours are searches, shapes are methods."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = [world for world in WORLDS if any(found["world"] == world for found in results)]
    figure = Figure(figsize=(7.5 * len(shown) + 3, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    searches = [name for name in ways()["searches"] if any(found["search"] == name for found in results)]
    methods = [name for name in ways()["methods"] if any(found["method"] == name for found in results)]
    colours = {name: colormaps["tab20"](place % 20) for place, name in enumerate(searches)}
    shapes = dict(zip(methods, "osD^vP*X<>hpd", strict=False))
    for panel, world in zip(panels, shown, strict=True):
        for (method, search), founds in cells([found for found in results if found["world"] == world]).items():
            tokens = [found["tokens"] / 1000 for found in founds]
            shares = [found["front_share"] for found in founds]
            spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
            panel.errorbar(
                statistics.mean(tokens),
                statistics.mean(shares),
                yerr=spread,
                color=colours.get(search, "grey"),
                marker=shapes.get(method, "."),
                linestyle="",
                alpha=0.8,
            )
        if ceiling := ceiling_of(world):
            panel.axhline(ceiling.share, color="grey", linestyle="--", linewidth=1)
            panel.annotate(
                f"ceiling of {ceiling.points} points",
                (0.01, ceiling.share),
                xycoords=("axes fraction", "data"),
                va="bottom",
                fontsize=8,
            )
        panel.set(xscale="log", xlabel="thousand training tokens", ylabel="front share", title=TITLES[world])
        panel.grid(alpha=0.3)
    marks = [Line2D([], [], color=colours[name], marker="o", linestyle="", label=name) for name in searches]
    marks += [Line2D([], [], color="grey", marker=shapes[name], linestyle="", label=name) for name in methods]
    figure.legend(handles=marks, loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})

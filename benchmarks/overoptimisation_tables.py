"""Table and picture of ``benchmarks.overoptimisation``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables

Results = Sequence[Mapping[str, Any]]
FAMILIES = ("nothing", "KL", "chi-squared", "ensemble", "PAR", "log-sigmoid", "gated")
LINES = ("-", "--", ":")


def write(output: Path, report: Mapping[str, Any]) -> None:
    """JSON, Markdown and the picture."""
    tables.write(output, report, text_of(report))
    draw(report["results"], output.with_suffix(".png"))


def text_of(report: Mapping[str, Any]) -> str:
    deviation = report["results"][0]["deviation"]
    about = [
        "A policy is trained on a proxy whose correlation with the gold reward is stated, and measured by the gold "
        "one, by enumeration of every reply to the held-out prompts. Gold and proxy: reward gained over the base, "
        f"whose deviation is {deviation:.3f} for both (under the base, within prompts). Peak: of the mean over seeds "
        "along the way. `nothing` to `gated`: benchmarks/overoptimisation.yaml. `moalign.diagnostics.proxies` says "
        "what a correlation alone makes sure. ±: standard deviation over the seeds, each with proxies of its own.",
    ]
    return tables.markdown("Proxies followed too far, and what helps", report, about, tables_of(report))


def tables_of(report: Mapping[str, Any]) -> list[tables.Table]:
    """A table for each correlation and length."""
    made, results = [], report["results"]
    for rho, steps in dict.fromkeys((found["rho"], found["steps"]) for found in results):
        alike = [found for found in results if (found["rho"], found["steps"]) == (rho, steps)]
        notes = [f"Not run, {name}: {reason}" for name, reason in report.get("not_run", {}).items()]
        title = f"Correlation {rho:g}, {steps} steps"
        columns = ["way", "gold, at the end", "gold, peak", "sqrt(KL) there", "step", "proxy, at the end"]
        columns += ["sqrt(KL), at the end", "sqrt(chi2), at the end", "seeds"]
        rows = [[way, *_row(mine)] for way, mine in by_way(alike).items()]
        made.append(tables.Table(title, columns, rows, notes))
    return made


def by_way(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """In the order in which they were first run."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for each in results:
        found.setdefault(each["way"], []).append(each)
    return found


def _row(mine: Results) -> list[tables.Cell]:
    line, last = along(mine), [found["looks"][-1] for found in mine]
    best = max(line, key=lambda look: look["gold"])
    return [
        tables.mean([look["gold"] for look in last]),
        f"{best['gold']:.3f}",
        f"{best['distance']:.2f}",
        f"{best['step']:.0f}",
        tables.mean([look["proxy"] for look in last]),
        f"{statistics.mean(math.sqrt(look['kl']) for look in last):.2f}",
        f"{statistics.mean(math.sqrt(look['chi2']) for look in last):.1f}",
        str(len(mine)),
    ]


def along(mine: Results) -> list[dict[str, float]]:
    """Means over the seeds at each look: gold reward, and ``distance``, sqrt(KL)."""
    return [
        {
            "step": looks[0]["step"],
            "gold": statistics.mean(look["gold"] for look in looks),
            "distance": statistics.mean(math.sqrt(max(0.0, look["kl"])) for look in looks),
        }
        for looks in zip(*(found["looks"] for found in mine), strict=True)
    ]


def draw(results: Results, file: Path) -> None:
    """Gold reward gained against sqrt(KL), a line for each way; colours are families. Of the first correlation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [found for found in results if (found["rho"], found["steps"]) == (results[0]["rho"], results[0]["steps"])]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    used: dict[str, int] = {}
    farthest = 0.0
    for way, mine in by_way(shown).items():
        family = next(name for name in FAMILIES if way.startswith(name))
        place = used[family] = used.get(family, -1) + 1
        line = along(mine)
        farthest = max(farthest, *(look["distance"] for look in line))
        panel.plot(
            [0.0, *(look["distance"] for look in line)],
            [0.0, *(look["gold"] for look in line)],
            color=f"C{FAMILIES.index(family)}",
            linestyle=LINES[place % len(LINES)],
            marker="o",
            markersize=3,
            label=way,
        )
    for name, style, label in (
        ("gold", "--", "the best policy for the gold reward"),
        ("proxy", ":", "the best policy for the proxy, at each price of KL"),
    ):
        optima = along([{"looks": [look | {"step": 0} for look in found["optima"][name]]} for found in shown])
        near = [each for each in optima if each["distance"] <= 1.05 * farthest]
        panel.plot(
            [each["distance"] for each in near], [each["gold"] for each in near], style, color="black", label=label
        )
    panel.axhline(0.0, color="grey", linewidth=0.8)
    title = f"Correlation of proxy and gold reward {shown[0]['rho']:g}, {shown[0]['steps']} steps"
    panel.set(xlabel="sqrt(KL) from the base", ylabel="gold reward gained over the base", title=title)
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})

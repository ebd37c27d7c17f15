"""How often what a front says no policy exceeds is false, by what its candidates are: worlds that can be enumerated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import measure, tables
from benchmarks.small_worlds import PRICE, PROMPTS, REPLIES, Array, World, even, normalised
from moalign import pareto
from moalign.engine.optimum import Optimum
from moalign.sweeps import optima

POINTS = (3, 11)
ABOUT = (
    "False: less than the exact front's hypervolume above the base. Volume: the median of what is stated, beside the "
    "exact one; 1 would be tight. Before: who varies least in what it says of the optimum is believed, and "
    "no less than anybody's lower limit. Now: unless others contradict it.",
)


def some(world: World, weights: Sequence[Array], least: float, most: float) -> list[Array]:
    return [world.tilted(each, world.rng.uniform(least, most)) for each in weights]


def one_collapsed(world: World, weights: Sequence[Array]) -> list[Array]:
    found = some(world, weights, 0.7, 1.1)
    found[len(found) // 2] = world.collapsed()
    return found


CANDIDATES: dict[str, Callable[[World, Sequence[Array]], list[Array]]] = {
    "near the best": lambda world, weights: some(world, weights, 0.8, 1.1),
    "short of it": lambda world, weights: some(world, weights, 0.3, 0.7),
    "beside it, at random": lambda world, weights: [
        normalised(world.tilted(each) + world.rng.normal(0, 1, (PROMPTS, REPLIES))) for each in weights
    ],
    "one says the same to everybody": one_collapsed,
    "all say the same to everybody": lambda world, weights: [world.collapsed() for _ in weights],
    "five times too far": lambda world, weights: some(world, weights, 5.0, 5.0),
}


def surest(estimates: Sequence[Optimum]) -> float:
    """The rule before contradictions counted: who varies least, and no less than anybody's lower limit."""
    value, error = min(estimates, key=lambda one: one.deviation).bound
    return max(value + optima.ERRORS * error, max(one.value - optima.ERRORS * one.stderr for one in estimates))


def volumes(kind: str, points: int, seed: int) -> tuple[float, float, float]:
    """The exact front's hypervolume above the base, and the most that is stated, by the rule before and by this one."""
    world, weights = World(1000 * points + seed), even(points)
    policies = CANDIDATES[kind](world, weights)
    everybody: dict[str | None, optima.Sampled] = {
        str(place): world.sampled(each) for place, each in enumerate(policies)
    }
    everybody[None] = world.sampled(world.reference)
    corner = world.values(world.reference)
    now = optima.bounds({str(place): each for place, each in enumerate(weights)}, everybody, PRICE)
    asked = [[one for each in everybody.values() if (one := each.about(row, PRICE))] for row in weights]
    stated = [[surest(estimates) for estimates in asked], list(now.values())]
    before, after = (pareto.hypervolume_at_most(weights, bounds, corner) or 0.0 for bounds in stated)
    return pareto.hypervolume(world.front(), corner), before, after


def result(kind: str, points: int, worlds: int) -> dict[str, Any]:
    """Of so many worlds in how many the stated volume is false, and the median of what it is beside the exact one."""
    found = [volumes(kind, points, seed) for seed in range(worlds)]
    told: dict[str, Any] = {"candidates": kind, "points": points, "worlds": worlds}
    for place, rule in enumerate(("before", "now"), start=1):
        told[f"{rule}_false"] = sum(each[place] < each[0] for each in found)
        told[f"{rule}_beside"] = median(each[place] / each[0] for each in found)
    return told | {"hardware": measure.hardware(torch.device("cpu"))}


def table_of(results: Sequence[Mapping[str, Any]]) -> tables.Table:
    columns = ("candidates", "points", "worlds", "false before", "false now", "volume before", "volume now")
    rows = [
        [each["candidates"], *(str(each[key]) for key in ("points", "worlds", "before_false", "now_false"))]
        + [f"{each[key]:.3f}" for key in ("before_beside", "now_beside")]
        for each in results
    ]
    return tables.Table("What is stated of the volume", columns, rows, ABOUT)


def main(
    worlds: Annotated[int, typer.Option(min=1, help="of each kind and number of points")] = 60,
    output: Annotated[Path | None, typer.Option(help="JSON; a Markdown table is written beside it")] = None,
) -> None:
    """Upper bounds on the hypervolume against enumeration; no model, no network."""
    report = tables.begin("false_bounds", measure.command_line("benchmarks.false_bounds"), None)
    report["results"] = [result(kind, points, worlds) for kind in CANDIDATES for points in POINTS]
    table = table_of(report["results"])
    tables.show([table], Console())
    if output is not None:
        tables.write(output, report, tables.markdown("Bounds that are false", report, (), [table]))


if __name__ == "__main__":
    typer.run(main)

"""What front each way of saving work reaches, in the demo's world, whose best front is known exactly."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import front_peers, measure, tables
from benchmarks.front_ways import PARTS, Request, make_base, run_sweep
from benchmarks.processes import run_apart
from benchmarks.tables import missing
from benchmarks.train_setup import Assignment, make_quiet
from benchmarks.train_task import Task

SEEDS = (0, 1, 2)


class PartName(StrEnum):
    fill = "fill"
    layers = "layers"
    layers_shipped = "layers-shipped"
    step = "step"
    peers = "peers"


def main(
    part: Annotated[list[PartName] | None, typer.Option(help="may be repeated; default all")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="may be repeated; default 0 1 2")] = None,
    way: Annotated[list[str] | None, typer.Option(help="by its name; may be repeated; default all of a part")] = None,
    further: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value, for every sweep; may be repeated")
    ] = None,
    bases: Annotated[Path, typer.Option(help="where base models of other depths are made, once")] = Path("runs/bases"),
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: torch's own choice")] = None,
    seconds: Annotated[bool, typer.Option(help="of each sweep; not where other work shares the machine")] = True,
    at_most: Annotated[int | None, typer.Option(min=1, help="so many sweeps now; --append goes on with others")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON; a Markdown table is written beside it")] = None,
    append: Annotated[bool, typer.Option(help="keep what is in the output already, and run what is missing")] = False,
) -> None:
    """Sweep after sweep, each an ordinary one measured exactly; no network. The output is written after each."""
    console = Console()
    report = tables.begin("front_share", measure.command_line("benchmarks.front_share"), output if append else None)
    report["commands"] = list(dict.fromkeys(report["commands"]))  # what goes on is the same command again
    wanted = requests(part or list(PartName), seed or SEEDS, further or (), bases, threads)
    wanted = [request for request in wanted if way is None or request.way in way]
    for request in missing(wanted, report)[:at_most]:
        with console.status(f"{request.part}: {request.way}, seed {request.seed}"):
            found = run(request)
        if not seconds and not PARTS[request.part].timing:
            found["seconds"] = found["step_seconds"] = None
        report["results"].append(found)
        if output is not None:
            tables.write(output, report, text_of(report))
    tables.show(tables_of(report["results"]), console)
    if report["results"]:
        console.print(measure.hardware_line(report["results"][-1]["hardware"]), highlight=False)


def requests(
    parts: Sequence[str], seeds: Sequence[int], further: Sequence[str], bases: Path, threads: int | None
) -> list[Request]:
    """Seed by seed, so that what is there after a while compares all ways."""
    made = []
    for seed in seeds:
        for name in map(str, parts):
            layers = PARTS[name].layers
            base = str((bases / f"tiny-assistant-{layers}-layers").resolve()) if layers else None
            made += [Request(name, way, seed, tuple(further), base, threads) for way in PARTS[name].ways]
    return made


def run(request: Request, target: Callable[[Any, Connection], None] | None = None) -> dict[str, Any]:
    """One sweep in a process of its own, its base made before where it is missing."""
    found: dict[str, Any] = run_apart(target or work, request, request.threads)
    return request.identity | found


def work(request: Request, connection: Connection) -> None:
    """The child process."""
    connection.send(("result", reached(request)))


def reached(request: Request) -> dict[str, Any]:
    """What the front of one sweep reaches, and what it cost."""
    with tempfile.TemporaryDirectory(prefix="moalign-front-share-") as directory:
        make_quiet(Assignment("", Task("", 0), directory, "cpu", request.threads, profile=False))
        layers = PARTS[request.part].layers
        if layers is not None and request.base is not None and not Path(request.base).exists():
            make_base(layers, Path(request.base))
        if request.part == "peers":
            found = front_peers.reached(request, Path(directory))
        else:
            found = run_sweep(request.settings(), measured=not PARTS[request.part].timing)
    return found | {"hardware": measure.hardware(torch.device("cpu"))}


def tables_of(results: Sequence[Mapping[str, Any]]) -> list[tables.Table]:
    """A table for each part and each set of further changes, in the order of ``PARTS``."""
    made = []
    for name, part in PARTS.items():
        of_part = [result for result in results if result["part"] == name]
        for further in dict.fromkeys(tuple(result["further"]) for result in of_part):
            ways = {
                way: [found for found in of_part if found["way"] == way and tuple(found["further"]) == further]
                for way in part.ways
            }
            ways = {way: sorted(found, key=lambda one: one["seed"]) for way, found in ways.items() if found}
            title = part.title + "".join(f", {change}" for change in further)
            changes = f"Recipe `{part.recipe}` with " + ", ".join(f"`{change}`" for change in part.common)
            notes = [changes, *(_changes(way, part.ways[way]) for way in ways)]
            made.append((_timing if part.timing else _front)(title, ways, notes))
    return made


def _changes(way: str, changes: Sequence[str]) -> str:
    return f"{way}: " + (", ".join(f"`{change}`" for change in changes) or "nothing else")


def _front(title: str, ways: Mapping[str, Sequence[Mapping[str, Any]]], notes: Sequence[str]) -> tables.Table:
    first = next(iter(ways.values()))
    timed = all(found["seconds"] is not None for founds in ways.values() for found in founds)
    rows = []
    for way, founds in ways.items():
        kinds = [point["kind"] for point in founds[0]["points"]]
        tokens = statistics.mean(found["tokens"] for found in founds)
        rows.append(
            [
                way,
                f"{kinds.count('trained')} + {kinds.count('mixed')}",
                _mean([found["front_share"] for found in founds]),
                " ".join(f"{found['front_share']:.3f}" for found in founds),
                _mean([found["front_share_worst"] for found in founds]),
                "" if founds is first else _difference(founds, first),
                f"{tokens / 1000:,.0f}",
                f"{tokens / statistics.mean(found['tokens'] for found in first):.2f}",
                *([f"{statistics.median(found['seconds'] for found in founds):.0f}"] if timed else []),
            ]
        )
    columns = (
        "way",
        "trained + mixed",
        "front share",
        "each seed",
        "worst served",
        "against the first way, same seeds",
        "thousand training tokens",
        "of the first way's",
        *(["sweep, s"] if timed else []),
    )
    if len({tuple(found["seed"] for found in founds) for founds in ways.values()}) > 1:
        notes = ["Not every way was run on every seed: means differ by that too, the differences do not.", *notes]
    return tables.Table(title, columns, rows, notes)


def _mean(values: Sequence[float], kind: str = ".3f") -> str:
    """Mean and its standard error over the seeds."""
    text = format(statistics.mean(values), kind)
    return f"{text} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else text


def _difference(founds: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]]) -> str:
    """Of the front share, seed by seed, where both have been run."""
    theirs = {found["seed"]: found["front_share"] for found in first}
    both = [found["front_share"] - theirs[found["seed"]] for found in founds if found["seed"] in theirs]
    return _mean(both, "+.3f") if both else ""


def _timing(title: str, ways: Mapping[str, Sequence[Mapping[str, Any]]], notes: Sequence[str]) -> tables.Table:
    seconds = {way: {found["seed"]: found["step_seconds"] for found in founds} for way, founds in ways.items()}
    first = next(iter(seconds.values()))
    rows = []
    for way, times in seconds.items():
        both = [seed for seed in times if seed in first]
        ratio = measure.Ratio.of([times[seed] for seed in both], [first[seed] for seed in both]) if both else ""
        rows.append([way, f"{statistics.median(times.values()) * measure.MILLISECONDS:.1f}", str(ratio)])
    return tables.Table(title, ("way", "ms a step and candidate", "times the first (quartiles)"), rows, notes)


def text_of(report: Mapping[str, Any]) -> str:
    results = report["results"]
    about = [
        "Front share: of what the best policy gains over the base, how much the best point of the front gains; the "
        "mean over even preferences, and the least (worst served), by enumeration of every reply to the held-out "
        "prompts. "
        "± is the standard error over seeds. A seed decides the prompts, the samples and the adapters' first weights; "
        "the base is the same. Tokens: of responses, over all candidates.",
    ]
    return tables.markdown("The front that each way of saving work reaches", report, about, tables_of(results))


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()

"""What a front of K candidates costs: moalign in one pass, moalign one by one, TRL's DPOTrainer run K times."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import measure, tables
from benchmarks.processes import Child
from benchmarks.sweep_engines import AUTO, ONE_BY_ONE, ONE_PASS, TRL, WAYS, work, write
from benchmarks.train_engines import Assignment
from benchmarks.train_step import Allocator
from benchmarks.train_task import Task

MOALIGN = (ONE_PASS, AUTO, ONE_BY_ONE)
CANDIDATES = (1, 2, 5, 11, 21)


class Model(StrEnum):
    tiny = "tiny"
    small = "small"


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 96, "layers": 4, "vocabulary": 300, "longest": 32, "rank": 8, "lr": 1e-2},
    "small": {"hidden": 256, "layers": 4, "vocabulary": 32000, "longest": 128, "rank": 16},
}
PAIRS = {"tiny": (1, 2), "small": (4,)}
STEPS = {"tiny": 50, "small": 8}


def main(
    model: Annotated[
        Model, typer.Option(help="width 96, vocabulary 300; or width 256, vocabulary 32,000")
    ] = Model.tiny,
    candidates: Annotated[list[int] | None, typer.Option(min=1, help="K; may be repeated; default 1 2 5 11 21")] = None,
    pairs_per_step: Annotated[
        list[int] | None, typer.Option(min=1, help="may be repeated; default 1 and 2, or 4 for the small model")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="of every candidate; default 50 tiny, 8 small")] = None,
    longest: Annotated[int | None, typer.Option(help="tokens of every row; default 32 tiny, 128 small")] = None,
    adapted: Annotated[
        list[str] | None, typer.Option(help="model.lora.layers; may be repeated; other than all without TRL alone")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="in which moalign's ways take turns")] = 3,
    trl_runs: Annotated[
        int | None, typer.Option(min=0, help="at most so many; the rest is extrapolated, and marked; 0: without TRL")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the base's weights")] = "float32",
    allocator: Annotated[Allocator, typer.Option(help="glibc's settings")] = Allocator.both,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: torch's own choice")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON; a Markdown table is written beside it")] = None,
    append: Annotated[bool, typer.Option(help="keep what is in the output already and add to it")] = False,
) -> None:
    """Time the training of a whole front on the same small model in three ways; no network."""
    shares: list[str | float] = [_layers(share) for share in adapted or ["all"]]
    if trl_runs != 0 and shares != ["all"]:
        raise typer.BadParameter("TRL adapts all layers here; add --trl-runs 0", param_hint="--adapted")
    console = Console()
    report = tables.begin("sweep_cost", measure.command_line("benchmarks.sweep_cost"), output if append else None)
    for pairs, share in product(pairs_per_step or PAIRS[model.value], shares):
        changes: dict[str, Any] = {"longest": longest} if longest else {}
        task = Task(
            lengths="uniform",
            pairs_per_step=pairs,
            warmup=0,
            steps=steps or STEPS[model.value],
            dtype=dtype,
            adapted=share,
            **SIZES[model.value] | changes,
        )
        for setting in ["default", "tuned"] if allocator is Allocator.both else [allocator.value]:
            with console.status("starting") as status:
                found = run(task, candidates or CANDIDATES, setting, rounds, trl_runs, device, threads, status.update)
            report["results"].append(found | {"model": model.value})
            tables.show([table_of(report["results"][-1])], console)
            if output is not None:
                tables.write(output, report, text_of(report))
    console.print(measure.hardware_line(report["results"][-1]["hardware"]), highlight=False)


def _layers(text: str) -> str | float:
    return text if text in ("all", "upper-half") else float(text)


def run(
    task: Task,
    candidates: Sequence[int],
    allocator: str,
    rounds: int,
    trl_runs: int | None,
    device: str,
    threads: int | None,
    say: Callable[[str], None],
    target: Callable[[Any, Connection], None] = work,
) -> dict[str, Any]:
    """What each way took for each number of candidates, smallest first; TRL's first K runs are its K candidates."""
    numbers = sorted(set(candidates))
    trl_runs = numbers[-1] if trl_runs is None else min(trl_runs, numbers[-1])
    found: dict[str, Any] = {str(number): {way: [] for way in MOALIGN} for number in numbers}
    trl: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="moalign-sweep-cost-") as directory:
        write(task, Path(directory))
        variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        children: dict[str, Child] = {}
        ready: dict[str, Any] = {}
        try:
            for way in WAYS if trl_runs else MOALIGN:
                say(f"allocator {allocator}, {task.pairs_per_step} pairs: loading, {way}")
                assignment = Assignment(way, task, directory, device, threads, profile=False)
                children[way] = Child(target, assignment, allocator, **variables)
                _, ready[way] = children[way].receive()
            for number in numbers:
                for turn in range(rounds):
                    for way in MOALIGN[:: 1 if turn % 2 == 0 else -1]:
                        say(f"allocator {allocator}, {task.pairs_per_step} pairs: {number} candidates, {way}")
                        found[str(number)][way].append(_train(children[way], number))
                while len(trl) < min(number, trl_runs):
                    say(f"allocator {allocator}, {task.pairs_per_step} pairs: TRL, run {len(trl) + 1}")
                    trl.append(_train(children[TRL], 1))
        finally:
            for child in children.values():
                child.close()
    return {
        "task": asdict(task),
        "allocator": allocator,
        "rounds": rounds,
        "hardware": measure.hardware(torch.device(device)),
        "ready": ready,
        "candidates": found,
        "trl": trl,
        "same_loss": same_loss(found, trl),
    }


def _train(child: Child, number: int) -> dict[str, Any]:
    child.send(number)
    return child.receive()[1]


def same_loss(found: Mapping[str, Any], trl: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the ways do not train the same; None where the losses of their first steps agree to 1e-4."""
    told = [
        (f"{number} candidates, {way}", trained["losses"])
        for number, ways in found.items()
        for way, rounds in ways.items()
        for trained in rounds
        if trained["losses"]
    ]
    told += [("TRL", trl[0]["losses"])] if trl else []
    for name, losses in told:
        for step, (mine, first) in enumerate(zip(losses, told[0][1], strict=True)):
            if not math.isclose(mine, first, abs_tol=1e-4):
                return f"loss of step {step}: {mine:.6g} ({name}) and {first:.6g} ({told[0][0]})"
    return None


def table_of(found: Mapping[str, Any]) -> tables.Table:
    task, trl = Task(**found["task"]), found["trl"]
    tokens = next(iter(found["ready"].values()))["tokens"]
    # the same for all three, so that one process's bad luck must not count against it
    ready = statistics.median(found["ready"][way]["loading"] + found["ready"][way]["reference"] for way in MOALIGN)
    rows = []
    for number in sorted(map(int, found["candidates"])):
        ways = found["candidates"][str(number)]
        theirs = _of_trl(trl, number) if trl else None
        alone = [trained["seconds"] for trained in ways[ONE_BY_ONE]]
        for way in MOALIGN:
            rounds = ways[way]
            seconds = [trained["seconds"] for trained in rounds]
            typical = {key: statistics.median(trained[key] for trained in rounds) for key in ("seconds", "total")}
            typical["total"] += ready
            label = f"{way} ({rounds[-1]['size']} together)" if way == AUTO else way
            against = ["", ""] if theirs is None else [_share(typical[key], theirs[key]) for key in typical]
            ratio = "" if way == ONE_BY_ONE else str(measure.Ratio.of(seconds, alone))
            peak = rounds[0]["peak_bytes"]
            name = f"K = {number}, {label}"
            rows.append(
                [f"**{name}**" if way == ONE_PASS else name, *_cells(typical, tokens * number, peak), ratio, *against]
            )
        if theirs is not None:
            mark = "" if number <= len(trl) else f", extrapolated from {len(trl)} runs"
            peak = max(trained["peak_bytes"] for trained in trl[:number])
            rows.append([f"K = {number}, TRL{mark}", *_cells(theirs, tokens * number, peak), "", "", ""])
    different = found["same_loss"]
    notes = [f"THE WAYS DIFFER: {different}" if different else "The losses of the first steps agree to 1e-4."]
    if trl:
        notes.append("TRL: " + ", ".join(f"{name}={value}" for name, value in trl[0]["settings"].items()))
    return tables.Table(
        title=f"{found['model']} model, {_pairs(task)}, {task.steps} steps; allocator: {found['allocator']}",
        columns=(
            "candidates, how",
            "training, s",
            "in all, s",
            "tokens/s",
            "peak MiB",
            "training / one by one (quartiles)",
            "training / TRL",
            "in all / TRL",
        ),
        rows=rows,
        notes=notes,
    )


def _pairs(task: Task) -> str:
    pairs = (
        f"{task.pairs_per_step} pair{'s' if task.pairs_per_step > 1 else ''} of {task.longest} tokens a row in a step"
    )
    return pairs if task.adapted == "all" else f"{pairs}, adapters on layers: {task.adapted}"


def _of_trl(trl: Sequence[Mapping[str, Any]], number: int) -> dict[str, float]:
    """The sum over the first ``number`` runs; their mean stands in for runs that were not made."""
    made = trl[:number]
    return {key: sum(trained[key] for trained in made) * number / len(made) for key in ("seconds", "total")}


def _cells(seconds: Mapping[str, float], tokens: int, peak: int) -> list[str]:
    return [
        f"{seconds['seconds']:.2f}",
        f"{seconds['total']:.2f}",
        f"{tokens / seconds['seconds']:,.0f}",
        f"{peak / measure.MIB:,.0f}",
    ]


def _share(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.3f}"


def text_of(report: Mapping[str, Any]) -> str:
    results = report["results"]
    about = [
        "Llamas with random weights, LoRA on all linear layers but the head, K preferences between two objectives that "
        "judge in turn. Every candidate takes the same steps on the same pairs. `in all` adds loading, the reference's "
        "log-probabilities and, for `auto`, measuring; imports are no part of it. Ratios below 1: less time.",
    ]
    return tables.markdown("A front of K candidates", report, about, [table_of(result) for result in results])


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()

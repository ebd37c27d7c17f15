"""Online training in two worlds whose optima are known: which way of weighting reaches how much, and how fast."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import measure, online_run, online_speed, online_tables, tables
from benchmarks.online_run import FIRST, LOSSES, RULES, SECOND, Request
from benchmarks.online_speed import ENGINES, Work
from benchmarks.processes import ALLOCATORS, Child, ChildError
from benchmarks.tables import missing
from moalign.validation import nearest

SEEDS = (0, 1, 2)


class PartName(StrEnum):
    rules = "rules"
    step = "step"
    speed = "speed"


def main(
    part: Annotated[list[PartName] | None, typer.Option(help="may be repeated; default all")] = None,
    world: Annotated[list[str] | None, typer.Option(help="first or second; may be repeated; default both")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="by its name; may be repeated; default all")] = None,
    loss: Annotated[list[str] | None, typer.Option(help="may be repeated; default reinforce rloo grpo")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="may be repeated; default 0 1 2")] = None,
    steps: Annotated[int, typer.Option(min=2, help="of every training")] = 150,
    looks: Annotated[int, typer.Option(min=1, help="at even distances over the steps; the last one is the end")] = 6,
    further: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value, for every training; may be repeated")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="in which what is timed takes turns")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: torch's own choice")] = None,
    at_most: Annotated[int | None, typer.Option(min=1, help="so many trainings now; --append goes on")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON; a Markdown table is written beside it")] = None,
    append: Annotated[bool, typer.Option(help="keep what is in the output already, and run what is missing")] = False,
) -> None:
    """Training after training, each measured exactly as it goes; no network. The output is written after each."""
    console = Console()
    report = tables.begin("online", measure.command_line("benchmarks.online"), output if append else None)
    report["commands"] = list(dict.fromkeys(report["commands"]))
    report["not_run"] = []

    def add(*found: dict[str, Any]) -> None:
        report["results"] += [each | {"hardware": measure.hardware(torch.device("cpu"))} for each in found]
        if output is not None and report["results"]:
            tables.write(output, report, online_tables.text_of(report))

    parts = part or list(PartName)
    for name, known, option in [(each, RULES, "--rule") for each in rule or ()] + [
        (each, (FIRST, SECOND), "--world") for each in world or ()
    ]:
        if name not in known:
            raise typer.BadParameter(f"there is no {name!r}{nearest(name, known)}", param_hint=option)
    if PartName.rules in parts:
        asked = requests(
            world or (FIRST, SECOND), rule or list(RULES), loss or list(LOSSES), seed or SEEDS, steps, looks
        )
        asked = [replace(each, further=tuple(further or ()), threads=threads) for each in asked]
        wanted, report["not_run"] = installed(asked)
        for request in missing(wanted, report)[:at_most]:
            with console.status(f"{request.world} world: {request.rule}, {request.loss}, seed {request.seed}"):
                try:
                    add({"part": "rules"} | request.identity | in_child(train, request, request.threads))
                except ChildError as error:  # a rule that fails must not take the others with it
                    reason = str(error).strip().splitlines()[-1]
                    report["not_run"].append(f"{request.rule}, {request.loss}, seed {request.seed}: failed, {reason}")
                    add()
    timed = Request(FIRST, "fixed weights", (loss or ["rloo"])[0], 0, 6, 1, tuple(further or ()), threads)
    if PartName.step in parts:
        with console.status("a step of five candidates"):
            add({"part": "step"} | timed.identity | in_child(step_seconds, (timed, rounds), threads))
    if PartName.speed in parts:
        for allocator in ALLOCATORS:
            with console.status(f"samples per second, allocator {allocator}"):
                add(speed(allocator, rounds, threads))
    tables.show(online_tables.tables_of(report), console)
    if report["results"]:
        console.print(measure.hardware_line(report["results"][-1]["hardware"]), highlight=False)


def requests(
    worlds: Sequence[str], rules: Sequence[str], losses: Sequence[str], seeds: Sequence[int], steps: int, looks: int
) -> list[Request]:
    """Seed by seed, so that what is there after a while compares all of them."""
    return [
        Request(world, rule, loss, seed, steps, looks)
        for seed in seeds
        for world in worlds
        for loss in losses
        for rule in rules
    ]


def installed(asked: Sequence[Request]) -> tuple[list[Request], list[str]]:
    """Those that can be run, and for the others what is missing."""
    from moalign import registry

    found = registry.discover()
    reasons = {each: online_run.why_not(each.rule, each.loss, found) for each in asked}
    notes = [f"{each.rule}, {each.loss}: not run, {reason}." for each, reason in reasons.items() if reason]
    return [each for each in asked if reasons[each] is None], list(dict.fromkeys(notes))


def in_child(target: Callable[[Any, Connection], None], argument: Any, threads: int | None) -> dict[str, Any]:
    """What the target finds in a process of its own."""
    variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    child = Child(target, argument, "default", **variables)
    try:
        return child.result(lambda text: None)
    finally:
        child.close()


def train(request: Request, connection: Connection) -> None:
    """The child process of a training."""
    _quiet(request.threads)
    found = online_run.train(request)
    if request.world == SECOND:
        found["most_of_linear"] = online_run.most_of_linear()
    connection.send(("result", found))


def step_seconds(argument: tuple[Request, int], connection: Connection) -> None:
    """The child process that times a step."""
    request, rounds = argument
    _quiet(request.threads)
    connection.send(("result", {"seconds": online_run.step_seconds(request, rounds), "candidates": 5}))


def _quiet(threads: int | None) -> None:
    from benchmarks.train_setup import Assignment, make_quiet
    from benchmarks.train_task import Task

    with tempfile.TemporaryDirectory(prefix="moalign-online-") as directory:
        make_quiet(Assignment("", Task("", 0), directory, "cpu", threads, profile=False))


def speed(allocator: str, rounds: int, threads: int | None, task: Work | None = None) -> dict[str, Any]:
    """Samples per second of each engine, in alternation; what one does not do is asked of none of them."""
    task = task or Work("", prompts=8, samples=8, steps=6, threads=threads)
    variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    children: dict[str, Child] = {}
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    try:
        for engine in ENGINES:
            children[engine] = Child(online_speed.work, replace(task, engine=engine), allocator, **variables)
            children[engine].receive()
        for turn in range(rounds + 1):
            for engine in ENGINES[:: 1 if turn % 2 else -1]:
                children[engine].send("again")
                _, trained = children[engine].receive()
                if turn:  # the first one warms up
                    found[engine].append(trained)
    finally:
        for child in children.values():
            child.close()
    medians = {name: statistics.median(each["samples_per_second"] for each in turns) for name, turns in found.items()}
    return {"part": "speed", "allocator": allocator, "work": asdict(task), "turns": found, "medians": medians}


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()

"""A whole DPO step with LoRA: moalign's engine beside TRL's DPOTrainer, step by step in turn.

Same model, adapter, pairs and batches; reference log-probabilities are computed before. Each engine has a process of
its own that waits while the other one works; every allocator setting is measured anew.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import measure, tables
from benchmarks.processes import Child
from benchmarks.train_engines import ENGINES, TRL_GROUPED, Assignment, same_loss, work
from benchmarks.train_task import Task, write_model, write_pairs


class Lengths(StrEnum):
    uniform = "uniform"
    dialogue = "dialogue"
    both = "both"


class Allocator(StrEnum):
    default = "default"
    tuned = "tuned"
    both = "both"


LONGEST = {"uniform": 128, "dialogue": 320}
TITLES = {
    "uniform": "rows of {longest} tokens, a quarter of them prompt",
    "dialogue": "dialogue-like rows of {shortest} to {longest} tokens, three quarters of them prompt",
}


def main(
    lengths: Annotated[Lengths, typer.Option(help="of prompts and responses")] = Lengths.both,
    longest: Annotated[
        int | None, typer.Option(help="tokens of the longest row; default 128 uniform, 320 dialogue")
    ] = None,
    hidden: Annotated[int, typer.Option(help="width of the model")] = 256,
    layers: Annotated[int, typer.Option()] = 4,
    vocab: Annotated[int, typer.Option()] = 32000,
    pairs: Annotated[int, typer.Option(help="in a step")] = 8,
    rank: Annotated[int, typer.Option(help="of the adapter, on all linear layers but the head")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="that are timed")] = 8,
    warmup: Annotated[int, typer.Option(min=1, help="steps before, in which losses are compared")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the base's weights")] = "float32",
    allocator: Annotated[Allocator, typer.Option(help="glibc's settings")] = Allocator.both,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: torch's own choice")] = None,
    grouped: Annotated[bool, typer.Option(help="dialogue: also TRL with batches of pairs of similar length")] = True,
    profile: Annotated[
        bool, typer.Option(help="print where the time goes; the times themselves then mean little")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="JSON; a Markdown table is written beside it")] = None,
    append: Annotated[bool, typer.Option(help="keep what is in the output already and add to it")] = False,
) -> None:
    """Time a DPO + LoRA step of moalign and of TRL on the same small model, in turn; no network."""
    console = Console()
    report = tables.begin("train_step", measure.command_line("benchmarks.train_step"), output if append else None)
    for kind in ["uniform", "dialogue"] if lengths is Lengths.both else [lengths.value]:
        task = Task(
            lengths=kind,
            longest=longest or LONGEST[kind],
            hidden=hidden,
            layers=layers,
            vocabulary=vocab,
            pairs_per_step=pairs,
            warmup=warmup,
            steps=steps,
            rank=rank,
            dtype=dtype,
        )
        engines = [name for name in ENGINES if name != TRL_GROUPED or (grouped and kind == "dialogue")]
        for setting in ["default", "tuned"] if allocator is Allocator.both else [allocator.value]:
            with console.status("starting") as status:
                found = run(task, engines, setting, device, threads, profile, status.update)
            report["results"].append(found)
            tables.show([table_of(found)], console)
            if output is not None:
                tables.write(output, report, text_of(report))
            for engine in engines if profile else []:
                console.print(f"{engine}, {kind}, allocator {setting}", style="bold")
                console.print(found["engines"][engine]["profile"], highlight=False, markup=False, soft_wrap=True)
    console.print(measure.hardware_line(report["results"][-1]["hardware"]), highlight=False)


def run(
    task: Task,
    engines: Sequence[str],
    allocator: str,
    device: str,
    threads: int | None,
    profile: bool,
    say: Callable[[str], None],
    target: Callable[[Any, Connection], None] = work,
) -> dict[str, Any]:
    """Seconds per step of each engine, taken in turn, with losses, tokens and settings."""
    with tempfile.TemporaryDirectory(prefix="moalign-train-step-") as directory:
        folder = Path(directory)
        write_model(task, folder / "model")
        write_pairs(task, folder / "training.jsonl", folder / "held_out.jsonl")
        variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        children: dict[str, Child] = {}
        try:
            say(f"{task.lengths}, allocator {allocator}: reference log-probabilities")
            for engine in engines:
                assignment = Assignment(engine, task, directory, device, threads, profile)
                children[engine] = Child(target, assignment, allocator, **variables)
            for child in children.values():
                child.receive()
            seconds = _in_turn(children, task, lambda text: say(f"{task.lengths}, allocator {allocator}: {text}"))
            results = {engine: child.result(lambda _: None) for engine, child in children.items()}
        finally:
            for child in children.values():
                child.close()
    for engine, result in results.items():
        result["seconds"] = seconds[engine]
    return {
        "task": asdict(task),
        "allocator": allocator,
        "hardware": measure.hardware(torch.device(device)),
        "engines": results,
        "same_loss": same_loss(results["moalign"], results["TRL"]) if {"moalign", "TRL"} <= set(results) else None,
    }


def _in_turn(children: Mapping[str, Child], task: Task, say: Callable[[str], None]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {engine: [] for engine in children}
    for step in range(task.all_steps):
        say(f"step {step + 1} of {task.all_steps}")
        for engine in list(children)[:: 1 if step % 2 == 0 else -1]:
            children[engine].send("go")
            _, elapsed = children[engine].receive()
            seconds[engine].append(elapsed)
    return seconds


def table_of(found: Mapping[str, Any]) -> tables.Table:
    task = Task(**found["task"])
    ours = found["engines"]["moalign"]
    title = TITLES[task.lengths].format(longest=task.longest, shortest=task.longest // 10)
    rows = []
    for name, engine in found["engines"].items():
        timed = engine["seconds"][task.warmup :]
        rate = _rate(engine, task)
        same_batches = name != TRL_GROUPED
        rows.append(
            [
                f"**{name}**" if name == "moalign" else name,
                f"{measure.MILLISECONDS * statistics.median(timed):,.0f}",
                f"{measure.MILLISECONDS * min(timed):,.0f}",
                f"{rate:,.0f}",
                f"{_rate(ours, task) / rate:.2f}",
                str(measure.Ratio.of(timed, ours["seconds"][task.warmup :])) if same_batches else "",
                f"{engine['losses'][task.warmup - 1]:.5f}" if same_batches else "",
                f"{engine['norms'][0]:.5f}" if same_batches else "",
                f"{engine['peak_resident_bytes'] / measure.MIB:,.0f}",
            ]
        )
    different = found["same_loss"]
    agreement = f"THE ENGINES DIFFER: {different}" if different else "Losses and gradient norms agree to 1e-4."
    settings = [f"{name}: {_settings(engine['settings'])}" for name, engine in found["engines"].items()]
    return tables.Table(
        title=f"{title}; allocator: {found['allocator']}",
        columns=(
            "engine",
            "ms per step, median",
            "least",
            "tokens/s",
            "moalign is faster by",
            "step by step (quartiles)",
            f"loss, step {task.warmup}",
            "gradient norm, step 1",
            "peak resident MiB",
        ),
        rows=rows,
        notes=[agreement, *settings],
    )


def _rate(engine: Mapping[str, Any], task: Task) -> float:
    return sum(engine["tokens"][task.warmup :]) / sum(engine["seconds"][task.warmup :])


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def text_of(report: Mapping[str, Any]) -> str:
    results = report["results"]
    task = Task(**results[0]["task"])
    about = [
        f"A Llama with random weights (width {task.hidden}, {task.layers} layers, vocabulary {task.vocabulary:,}, "
        f"{task.dtype}), LoRA of rank {task.rank} on all linear layers but the head, {task.pairs_per_step} pairs in a "
        f"step, {task.steps} steps in turn after {task.warmup} that do not count. Tokens: prompts and responses of "
        "both sides of every pair, without padding, for all engines alike.",
    ]
    return tables.markdown("A DPO step beside TRL's", report, about, [table_of(result) for result in results])


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()

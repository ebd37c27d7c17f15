"""What K candidates together take of the memory: moalign's formula beside what torch allocates and what is resident."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import measure, sweep_cost, tables
from benchmarks.processes import Child
from benchmarks.sweep_engines import OBJECTIVES, candidates_of, write
from benchmarks.train_setup import Assignment, make_quiet, open_workshop
from benchmarks.train_task import Task

STEPS = 2  # moments are there from the second step on
SIZES: dict[str, dict[str, Any]] = {
    **sweep_cost.SIZES,
    "wide": {"hidden": 512, "layers": 8, "vocabulary": 32000, "longest": 128, "rank": 16},
}
PAIRS = {"tiny": 1, "small": 4, "wide": 1}
WARM_UP = Task(lengths="uniform", steps=STEPS, warmup=0, pairs_per_step=1, **sweep_cost.SIZES["tiny"])


class Model(StrEnum):
    tiny = "tiny"
    small = "small"
    wide = "wide"


@dataclass(frozen=True)
class Request:
    """So many candidates together on a model, its files in ``directory``; those of a warm-up in ``warm_up``."""

    assignment: Assignment
    number: int
    checkpointing: bool
    warm_up: str


def main(
    model: Annotated[
        list[Model] | None, typer.Option(help="width 96, 256 or 512; may be repeated; default: all")
    ] = None,
    candidates: Annotated[list[int] | None, typer.Option(min=1, help="K; may be repeated; default 1 2 5 11 21")] = None,
    pairs_per_step: Annotated[int | None, typer.Option(min=1, help="default 1, or 4 for the small model")] = None,
    longest: Annotated[int | None, typer.Option(help="tokens of every row; default 32 tiny, else 128")] = None,
    checkpointing: Annotated[bool, typer.Option(help="layers run again in the backward pass")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the base's weights")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: torch's own choice")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON; a Markdown table is written beside it")] = None,
    append: Annotated[bool, typer.Option(help="keep what is in the output already and add to it")] = False,
) -> None:
    """Predict and measure the memory of K candidates in one pass, each K in a fresh process; no network."""
    console = Console()
    report = tables.begin("sweep_memory", measure.command_line("benchmarks.sweep_memory"), output if append else None)
    for name in model or list(Model):
        changes: dict[str, Any] = {"longest": longest} if longest else {}
        task = Task(
            lengths="uniform",
            pairs_per_step=pairs_per_step or PAIRS[name.value],
            warmup=0,
            steps=STEPS,
            dtype=dtype,
            **SIZES[name.value] | changes,
        )
        with console.status("starting") as status:
            numbers = sorted(set(candidates or sweep_cost.CANDIDATES))
            found = run(task, numbers, checkpointing, device, threads, status.update)
        report["results"].append(found | {"model": name.value})
        tables.show([table_of(report["results"][-1])], console)
        if output is not None:
            tables.write(output, report, text_of(report))
    console.print(measure.hardware_line(report["results"][-1]["hardware"]), highlight=False)


def run(
    task: Task, numbers: list[int], checkpointing: bool, device: str, threads: int | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """For each number of candidates what ``work`` sends."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="moalign-sweep-memory-") as directory:
        folder, warm_up = Path(directory) / "model", Path(directory) / "warm-up"
        for each, where in ((task, folder), (replace(WARM_UP, dtype=task.dtype), warm_up)):
            where.mkdir()
            write(each, where)
        for number in numbers:
            say(f"width {task.hidden}: {number} candidates")
            assignment = Assignment("one pass", task, str(folder), device, threads, profile=False)
            variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
            child = Child(work, Request(assignment, number, checkpointing, str(warm_up)), "default", **variables)
            try:
                found[str(number)] = child.result(say)
            finally:
                child.close()
    return {
        "task": asdict(task),
        "checkpointing": checkpointing,
        "hardware": measure.hardware(torch.device(device)),
        "candidates": found,
    }


def work(request: Request, connection: Connection) -> None:
    """The child process. In bytes: the formula's parts; what torch had allocated and what was resident at the most."""
    make_quiet(request.assignment)
    import torch

    device = torch.device(request.assignment.device)
    _train(open_workshop(replace(request.assignment, directory=request.warm_up, task=WARM_UP), OBJECTIVES), request)
    gc.collect()
    libraries = measure.resident_bytes()
    workshop = open_workshop(request.assignment, OBJECTIVES)
    gc.collect()
    loaded = measure.resident_bytes()
    above = None if device.type == "cuda" else measure.peak_extra_bytes(lambda: _train(workshop, request), device)
    resident = None if libraries is None or loaded is None or above is None else loaded - libraries + above
    if above is None:
        _train(workshop, request)  # slots and libraries' own workspaces are there before tensors are counted
    gc.collect()
    policy = workshop.model.policy
    tensors = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
    # training lays the adapters out anew; the profiler does not see where those end that came before it
    kept = [tensor for name, tensor in tensors.items() if device.type == "cuda" or "lora_" not in name]
    there = {tensor.data_ptr(): tensor.nbytes for tensor in kept}
    allocated = sum(there.values()) + measure.allocated_bytes(lambda: _train(workshop, request), device)
    parts = _predicted(workshop, request)
    connection.send(("result", {"predicted": parts, "allocated": allocated, "resident": resident}))


def _train(workshop: Any, request: Request) -> None:
    from moalign.engine.train import train_together
    from moalign.engine.trainee import Trainee
    from moalign.sweeps.candidate import batch_source, job_of, slots

    def ignore(step: int, metrics: dict[str, Any]) -> None: ...

    trainees = []
    for candidate, slot in zip(candidates_of(request.number), slots(request.number), strict=True):
        job = job_of(candidate, workshop, ())
        changes = {"gradient_checkpointing": request.checkpointing, "steps": STEPS}
        job = replace(job, settings=job.settings.model_copy(update=changes))
        trainees.append(Trainee(job, batch_source(candidate, workshop, slot), slot, ignore))
    train_together(workshop.model, trainees, workshop.cache, workshop.accelerator)
    for trainee in trainees:
        _ = trainee.result  # raises where a candidate has failed
        for parameter in trainee.parameters:
            parameter.grad = None


def _predicted(workshop: Any, request: Request) -> dict[str, Any]:
    from moalign.engine import memory
    from moalign.sweeps.candidate import batch_source

    source = batch_source(candidates_of(1)[0], workshop)
    formula = memory.measure(workshop.model, request.checkpointing)
    steps = [memory.passes(workshop.model, *source.at(step)) for step in range(STEPS)]
    total = max(formula.training(request.number, sizes) for sizes in steps)
    return {
        "base": formula.base,
        "adapters": request.number * formula.adapter,
        "moments": 2 * request.number * formula.adapter,
        "pass": total - formula.base - 4 * request.number * formula.adapter,
        "all": total,
        "formula": asdict(formula),
        "passes": [asdict(size) for size in steps[0]],
    }


def table_of(found: Mapping[str, Any]) -> tables.Table:
    task = Task(**found["task"])
    rows = []
    for number in sorted(map(int, found["candidates"])):
        told = found["candidates"][str(number)]
        parts, allocated, resident = told["predicted"], told["allocated"], told["resident"]
        rows.append(
            [
                f"K = {number}",
                *(_mib(parts[name]) for name in ("adapters", "moments", "pass", "all")),
                _mib(allocated),
                _ratio(parts["all"], allocated),
                _ratio(parts["all"] - parts["base"], allocated - parts["base"]),
                "" if resident is None else _mib(resident),
                "" if resident is None else _ratio(parts["all"], resident),
            ]
        )
    first = next(iter(found["candidates"].values()))["predicted"]
    formula = first["formula"]
    kept = formula["shared" if any(size["shared"] for size in first["passes"]) else "apart"]["kept"]
    pairs = f"{task.pairs_per_step} pair{'s' if task.pairs_per_step > 1 else ''} of {task.longest} tokens a row"
    return tables.Table(
        title=f"{found['model']}: width {task.hidden}, {task.layers} layers, vocabulary {task.vocabulary:,}, {pairs}"
        + (", checkpointing" if found["checkpointing"] else ""),
        columns=(
            "candidates",
            "adapters",
            "moments",
            "pass",
            "predicted, MiB",
            "allocated, MiB",
            "predicted / allocated",
            "both above the base",
            "resident, MiB",
            "predicted / resident",
        ),
        rows=rows,
        notes=[
            f"Base {_mib(first['base'])} MiB, an adapter {_mib(formula['adapter'])}. A pass keeps "
            f"{kept['position']:,.0f} bytes a position, {kept['attended']:,.1f} a pair of positions in a row, "
            f"{kept['token']:,.0f} a response token; the head has {formula['logits']:,.0f} bytes a token for "
            f"{formula['chunk']:,} tokens at a time."
        ],
    )


def _mib(count: int) -> str:
    mib = count / measure.MIB
    return f"{mib:,.2f}" if mib < 10 else f"{mib:,.1f}" if mib < 1000 else f"{mib:,.0f}"


def _ratio(predicted: int, measured: int) -> str:
    return f"{predicted / measured:.3f}" if measured else str(math.nan)


def text_of(report: Mapping[str, Any]) -> str:
    results = report["results"]
    about = [
        "Llamas with random weights, LoRA on all linear layers but the head, K candidates in one pass, each K in a "
        "fresh process. `allocated`: the most bytes of tensors at once, as torch records its allocations, the base "
        "among them. `resident`: the process's highest resident memory above the libraries'.",
    ]
    return tables.markdown("The memory of K together", report, about, [table_of(result) for result in results])


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app()

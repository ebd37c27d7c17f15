"""``token_logps`` beside its peers, in alternation: time, share of the bare GEMMs, peak memory, error.

On a CPU every table is measured under two allocator settings, each in a process of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import core_run, measure, tables
from benchmarks.core_run import Request
from benchmarks.modes import FLOOR_GEMMS, TITLES
from benchmarks.peers import MOALIGN, VARIANTS
from benchmarks.problem import Shape
from benchmarks.processes import Child

GPU_COMMAND = (
    "python -m benchmarks.fused_core --device cuda --dtype bfloat16 --grid gpu --mode all --rounds 20 "
    "--output benchmarks/results/fused_core_gpu.json"
)
HELP = f"""Time moalign's token log-probabilities beside its peers, in alternation, each first checked against float64.

The tables of a GPU (D 2048-8192, V 32k-152k, N 4k-64k, bf16) come from:

{GPU_COMMAND}
"""
# tokens, hidden, vocabulary: the shape of the target first, then one size at a time away from it
GPU_GRID = (
    (8192, 4096, 131072),
    (4096, 4096, 131072),
    (16384, 4096, 131072),
    (65536, 4096, 131072),
    (8192, 2048, 131072),
    (8192, 8192, 131072),
    (8192, 4096, 32000),
    (8192, 4096, 32768),
    (8192, 4096, 129920),
    (8192, 4096, 151936),
    (65536, 2048, 151936),
)


class Mode(StrEnum):
    frozen = "frozen"
    forward = "forward"
    objectives = "objectives"
    trainable = "trainable"
    all = "all"


class Allocator(StrEnum):
    default = "default"
    tuned = "tuned"
    both = "both"


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    tokens: Annotated[int, typer.Option(help="N")] = 2048,
    hidden: Annotated[int, typer.Option(help="D")] = 256,
    vocab: Annotated[int, typer.Option(help="V; 32768 shows what a power of two changes")] = 32000,
    dtype: Annotated[str | None, typer.Option(help="default: float32 on a CPU, bfloat16 on a GPU")] = None,
    mode: Annotated[list[Mode], typer.Option(help="may be given several times")] = [Mode.frozen],  # noqa: B006  typer reads the default and never changes it
    rounds: Annotated[int, typer.Option(min=1, help="of the alternation, after one that does not count")] = 10,
    allocator: Annotated[Allocator, typer.Option(help="glibc's settings; CPU only")] = Allocator.both,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; default: torch's own choice")] = None,
    only: Annotated[list[str] | None, typer.Option(help="a variant's name, beside moalign; may be repeated")] = None,
    memory: Annotated[bool, typer.Option(help="measure peak memory, a process per variant on a CPU")] = True,
    grid: Annotated[str | None, typer.Option(help="gpu: the shapes of the table, instead of one shape")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON; a Markdown table is written beside it")] = None,
    append: Annotated[bool, typer.Option(help="keep what is in the output already and add to it")] = False,
) -> None:
    console = Console()
    unknown = set(only or ()) - {variant.name for variant in VARIANTS}
    if unknown:
        raise typer.BadParameter(f"no variant is called {sorted(unknown)[0]!r}; known: {', '.join(_names())}")
    if grid not in (None, "gpu"):
        raise typer.BadParameter(f"no grid is called {grid!r}; known: gpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"torch {torch.__version__} sees no GPU here. Where there is one: {GPU_COMMAND}")
    on_cpu = device == "cpu"
    kind = dtype or ("float32" if on_cpu else "bfloat16")
    sizes = GPU_GRID if grid else ((tokens, hidden, vocab),)
    modes = tuple(TITLES) if Mode.all in mode else tuple(entry.value for entry in mode)
    settings = ["default", "tuned"] if allocator is Allocator.both else [allocator.value]
    report = tables.begin("fused_core", measure.command_line("benchmarks.fused_core"), output if append else None)
    for shape in (Shape(*size, kind) for size in sizes):
        for setting in settings if on_cpu else ["default"]:
            found = in_child(
                Request(shape, modes, device, rounds, threads, tuple(only or ()), memory), setting, console
            )
            report["results"].append(found)
            tables.show(tables_of([found]), console)
            if output is not None:  # after every table, so that a run which is cut short leaves what it has
                tables.write(output, report, text_of(report))
    console.print(measure.hardware_line(report["results"][-1]["hardware"]), highlight=False)


def _names() -> list[str]:
    return [variant.name for variant in VARIANTS]


def in_child(request: Request, allocator: str, console: Console) -> dict[str, Any]:
    """Measure in a process that starts with this allocator setting."""
    child = Child(_measure, request, allocator)
    try:
        with console.status("starting") as status:
            found = child.result(lambda text: status.update(f"{request.shape}, allocator {allocator}: {text}"))
    finally:
        child.close()
    return {"allocator": allocator, **found}


def _measure(request: Request, connection: Connection) -> None:
    modes = core_run.run(request, lambda text: connection.send(("progress", text)))
    facts = measure.hardware(torch.device(request.device))
    connection.send(("result", {"hardware": facts, "rounds": request.rounds, "modes": modes}))


def tables_of(results: Sequence[Mapping[str, Any]]) -> list[tables.Table]:
    """A table per shape, mode and allocator setting."""
    made = []
    for result in results:
        for found in result["modes"]:
            shape = Shape(**found["shape"])
            where = "" if "gpu" in result["hardware"] else f"; allocator: {result['allocator']}"
            gemms = FLOOR_GEMMS[found["mode"]]
            notes = [f"u, the gradient of every token (N x D), takes {found['hidden_bytes'] / measure.MIB:,.0f} MiB."]
            notes += [f"{row['name']}: {row['skipped']}" for row in found["rows"] if "skipped" in row]
            made.append(
                tables.Table(
                    title=f"{TITLES[found['mode']]}: {shape}{where}",
                    columns=(
                        "variant",
                        "ms, median",
                        "ms, least",
                        "times moalign (quartiles)",
                        f"times the floor ({gemms} GEMM{'s' if gemms > 1 else ''})",
                        "peak extra MiB",
                        "error, nats",
                        "error, gradient",
                        "where p > 0.999",
                    ),
                    rows=[_cells(row) for row in found["rows"] if "skipped" not in row],
                    notes=notes,
                )
            )
    return made


def _cells(row: Mapping[str, Any]) -> list[str]:
    milliseconds = [measure.MILLISECONDS * value for value in row["seconds"]]
    errors = row["errors"] or {}
    peak = row["peak_bytes"]
    return [
        f"**{row['name']}**" if row["name"] == MOALIGN else row["name"],
        f"{statistics.median(milliseconds):.1f}",
        f"{min(milliseconds):.1f}",
        str(measure.Ratio(**row["ratio"])) if "ratio" in row else "",
        f"{row['floor']['median']:.2f}",
        "" if peak is None else f"{peak / measure.MIB:,.0f}" if isinstance(peak, int) else peak,
        *(f"{errors[name]:.1e}" if errors.get(name) is not None else "" for name in _ERRORS),
    ]


_ERRORS = ("logps", "gradient", "sure_gradient")


def text_of(report: Mapping[str, Any]) -> str:
    results = report["results"]
    about = [
        f"Medians of {results[0]['rounds']} rounds in alternation. Bare GEMMs: the same products alone, in the same "
        "rounds; the floor is the fastest of their rows. Peak extra memory: of a first call in a process of its own, "
        "gradients included. Errors: against float64 on 8 tokens, of which 4 have p > 0.999.",
        "How each is called: " + "; ".join(f"{variant.name}: {variant.about}" for variant in VARIANTS) + ".",
    ]
    return tables.markdown("The fused core beside its peers", report, about, tables_of(results))


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command(help=HELP)(main)

if __name__ == "__main__":
    app()

"""One shape and mode: every variant's errors, peak memory and times. Runs in a process with one allocator setting."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import measure, processes
from benchmarks.modes import MODES, floors
from benchmarks.peers import MOALIGN, VARIANTS, LogpsFunction, Unavailable
from benchmarks.problem import SURE, Problem, Shape, errors, make, truth

TINY = Shape(4 * SURE, 16, 64, "float32")  # loads a variant's code before its memory is measured


@dataclass(frozen=True)
class Request:
    """What to measure: ``modes`` of one shape, on a device, ``rounds`` times."""

    shape: Shape
    modes: tuple[str, ...]
    device: str
    rounds: int
    threads: int | None = None
    only: tuple[str, ...] = ()
    """names of variants, beside moalign; none: all"""
    memory: bool = True


def run(request: Request, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One result per mode: {"mode", "shape", "hidden_bytes", "rows": [row, ...]}.

    A row has "name", "about" and either "skipped" (why) or "seconds", "ratio", "floor", "peak_bytes", "errors".
    "floor" of the result names the row of bare GEMMs that was fastest; that of a row is its time over it.
    """
    if request.threads:
        torch.set_num_threads(request.threads)
    device = torch.device(request.device)
    available, skipped = load(device, request.only)
    memory = {mode: measure_memory(request, mode, available, say) for mode in request.modes}
    say("inputs and truth")
    problem = make(request.shape, device)
    return [measure_mode(request, mode, problem, available, skipped, memory[mode], say) for mode in request.modes]


def load(device: torch.device, only: tuple[str, ...]) -> tuple[dict[str, LogpsFunction], dict[str, str]]:
    """The variants that run here, and why the others do not."""
    available: dict[str, LogpsFunction] = {}
    skipped: dict[str, str] = {}
    for variant in VARIANTS:
        if only and variant.name not in only and variant.name != MOALIGN:
            continue
        try:
            available[variant.name] = variant.load(device)
        except Unavailable as reason:
            skipped[variant.name] = str(reason)
    return available, skipped


def measure_memory(
    request: Request, mode: str, available: Mapping[str, LogpsFunction], say: Callable[[str], None]
) -> dict[str, Any]:
    """Peak bytes of a first call of each variant; a text where it failed. On a CPU in a process of its own each."""
    if not request.memory:
        return {}
    device = torch.device(request.device)
    peaks: dict[str, Any] = {}
    for name, logps in available.items():
        say(f"{mode}: memory of {name}")

        def peak(logps: LogpsFunction = logps) -> int | None:
            problem = make(request.shape, device)
            tiny = make(Shape(TINY.tokens, TINY.hidden, TINY.vocabulary, request.shape.dtype), device)
            with suppress(Exception):  # a size that a kernel refuses is no reason against the size that was asked for
                MODES[mode](logps, tiny)
            return measure.peak_extra_bytes(lambda: MODES[mode](logps, problem), device)

        try:
            peaks[name] = processes.in_fork(peak) if device.type == "cpu" else peak()
        except Exception as error:  # what a peer raises is its own affair; the table says it
            peaks[name] = f"{type(error).__name__}: {measure.first_line(error)}"
    return peaks


def measure_mode(
    request: Request,
    mode: str,
    problem: Problem,
    available: Mapping[str, LogpsFunction],
    skipped: Mapping[str, str],
    memory: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    device = problem.hidden.device
    right, checked = truth(problem), problem.only_checked_rows()
    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, Any] = {}
    skipped = dict(skipped)
    for name, logps in available.items():
        say(f"{mode}: {name} against float64")
        try:
            error = errors(mode, checked, right, MODES[mode](logps, checked))
        except Exception as fault:
            skipped[name] = f"{type(fault).__name__}: {measure.first_line(fault)}"
            continue
        wrong = error.too_large(request.shape.dtype)
        if wrong is not None:
            skipped[name] = f"not timed, its result is wrong: {wrong}"
            continue
        found[name] = asdict(error)
        calls[name] = partial(MODES[mode], logps, problem)
    del right, checked
    bare = floors(mode, problem, request.shape)
    calls |= bare
    times = measure.alternate(
        calls, request.rounds, device, lambda number: say(f"{mode}: round {number} of {request.rounds}")
    )
    floor = min(bare, key=lambda name: statistics.median(times[name]))
    about = {variant.name: variant.about for variant in VARIANTS} | dict.fromkeys(
        bare, "the floor is the fastest of these"
    )
    rows: list[dict[str, Any]] = []
    for name in [*bare, *(variant.name for variant in VARIANTS if variant.name in {*available, *skipped})]:
        row: dict[str, Any] = {"name": name, "about": about[name]}
        if name in times:
            row["seconds"] = times[name]
            row["floor"] = asdict(measure.Ratio.of(times[name], times[floor]))
            if MOALIGN in times:
                row["ratio"] = asdict(measure.Ratio.of(times[name], times[MOALIGN]))
            row["peak_bytes"] = memory.get(name)
            row["errors"] = found.get(name)
        else:
            row["skipped"] = skipped[name]
        rows.append(row)
    hidden_bytes = problem.hidden.numel() * problem.hidden.element_size()
    shape = request.shape.as_dict()
    return {"mode": mode, "shape": shape, "hidden_bytes": hidden_bytes, "floor": floor, "rows": rows}

"""Time and memory: calls in alternation, the peak of a call's memory, and the name of what it ran on."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

MILLISECONDS = 1e3
MIB = 2**20


@dataclass(frozen=True)
class Ratio:
    """How many times as long: the median of the ratios within each round, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerator: list[float], denominator: list[float]) -> Ratio:
        ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
        if len(ratios) < 2:
            return cls(ratios[0], ratios[0], ratios[0])
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(statistics.median(ratios), low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, with the release of what it returns: giving memory back is part of what an allocator costs."""
    synchronise(device)
    start = time.perf_counter()
    result = call()
    del result
    synchronise(device)
    return time.perf_counter() - start


def alternate(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, on_round: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one round that does not count.

    Each round begins one call further on, so that no call always has the same one before it.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + 1):
            on_round(number)
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                elapsed = seconds(calls[name], device)
                if number:
                    times[name].append(elapsed)
    finally:
        gc.enable()
    return times


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The largest amount of memory in use during the call, above what was in use before it.

    On a GPU as the caching allocator counts it; on Linux resident memory, read to the page from the kernel's high-water
    mark, so libraries' own scratch counts as well; None elsewhere. Meaningful in a process that has not made this call
    before: kept buffers would not show a second time.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        call()  # what kernels need while they are tuned is none of the operation's; buffers that it keeps are
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    resident = resident_bytes()
    if resident is None:
        return None
    result = call()
    del result
    return max(0, _resident("VmHWM") - resident)


def resident_bytes() -> int | None:
    """Resident memory of this process, without what was freed; the high-water mark begins again here. Linux only."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that still counts as resident would hide what is taken anew
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def allocated_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that torch's own allocator has out at once during the call, above what was before.

    On a CPU from the profiler's record of every allocation, those inside of operations among them. What the call
    only frees is left out: the record knows blocks of earlier records, and garbage of theirs may go during this one.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory(prefix="moalign-trace-") as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes: list[int] = []
    live: set[int] = set()
    for event in sorted(events, key=lambda event: event["ts"]):
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            live.add(address)
            changes.append(size)
        elif address in live:
            live.remove(address)
            changes.append(size)
    return max(accumulate(changes), default=0)


def _resident(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: _version(name) for name in ("moalign", "trl", "liger-kernel", "transformers", "triton")},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["cuda"] = torch.version.cuda
    return facts


def hardware_line(facts: Mapping[str, Any]) -> str:
    where = f"{facts['gpu']}, CUDA {facts['cuda']}" if "gpu" in facts else f"{facts['cpu']}, {facts['threads']} threads"
    peers = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return f"{where}; torch {facts['torch']}, {peers}; {facts['libc']}; {facts['date']}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    fields = {
        name: match[1] if (match := re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)) else ""
        for name in ("model name", "cpu family", "model")
    }
    if not fields["model name"]:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def command_line(module: str) -> str:
    return " ".join(["python -m", module, *map(shlex.quote, sys.argv[1:])])

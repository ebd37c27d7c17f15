"""Do things with a distribution's plugins in another process, whatever they do to it.

The child tells what it is about to do and what it found, one JSON line each. A child that exits, dies or is silent for
longer than the deadline has been stopped by the last thing it announced.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

from moalign.supervisor import first_place, how_it_ended

CHILD = "from moalign.commands.plugin_examination import main; main()"
SECONDS_TO_LEAVE = 2.0


def examine(distribution: str, deadline: float, *, kit: bool = True) -> list[dict[str, Any]]:
    """The events of the examination of one distribution; the last is {"event": "end"} or {"event": "died"}.

    ``kit``: run the conformance kit on the plugins; else they are only loaded.

    "died" comes with ``doing``, what was under way, ``how``, and ``where``, the place in the sources if known.
    """
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", CHILD, distribution, *(["kit"] if kit else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        silent = True  # also where the listening is interrupted
        try:
            events, silent = _listen(child, deadline)
        finally:
            _end(child, silent)
        if events and events[-1]["event"] == "end":
            return events
        return [*events, _death(child, events, silent, deadline, errors)]


def _listen(child: subprocess.Popen[bytes], deadline: float) -> tuple[list[dict[str, Any]], bool]:
    """The child's events until it ends or has nothing to say for too long; whether it was the latter."""
    lines: queue.Queue[bytes] = queue.Queue()
    assert child.stdout is not None
    threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True).start()
    events: list[dict[str, Any]] = []
    while True:
        try:
            line = lines.get(timeout=deadline)
        except queue.Empty:
            return events, True
        if not line.endswith(b"\n"):
            return events, False
        with contextlib.suppress(ValueError):  # a plugin that writes to every descriptor that it can find
            events.append(json.loads(line))
        if events and events[-1]["event"] == "end":
            return events, False


def _pump(source: IO[bytes], lines: queue.Queue[bytes]) -> None:
    for line in source:
        lines.put(line)
    lines.put(b"")


def _end(child: subprocess.Popen[bytes], silent: bool) -> None:
    """Let a child that has finished go; have one that hangs write its stack, as faulthandler does on SIGABRT.

    Whatever processes either of them has started are ended.
    """
    if silent:
        child.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(SECONDS_TO_LEAVE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _death(
    child: subprocess.Popen[bytes],
    events: Sequence[Mapping[str, Any]],
    silent: bool,
    deadline: float,
    errors: IO[bytes],
) -> dict[str, Any]:
    doing = next((event["what"] for event in reversed(events) if event["event"] == "doing"), "starting Python")
    how = f"did not finish within {deadline:g} seconds" if silent else how_it_ended(child.returncode)
    errors.seek(0)
    where = first_place(errors.read().decode(errors="replace"))
    return {"event": "died", "doing": doing, "how": how, "where": where}

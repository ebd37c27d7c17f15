"""Runs that are broken off, as a user or the system does it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_line
import pytest

from moalign import registry
from moalign.config import Config
from moalign.sweeps import run
from moalign.sweeps.observe import Observer


class StopAfterSteps(Observer):
    """Interrupts the run as Ctrl-C does, after so many steps in all."""

    def __init__(self, steps: int):
        self.left = steps

    def on_step(self, candidate, step, metrics):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class StopAfterCandidates(Observer):
    """Interrupts the run as Ctrl-C does, when so many candidates have ended."""

    def __init__(self, candidates: int = 1):
        self.left = candidates

    def on_candidate_end(self, outcome):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def break_off_and_resume(settings: Config, directory: Path, stop: Observer) -> Path:
    """A run of these settings that ``stop`` interrupts, and that then goes on to its end."""
    with pytest.raises(KeyboardInterrupt):
        run.start(settings, directory, registry.discover(), stop)
    run.resume(directory, registry.discover(), Observer())
    return directory


def kill_and_resume(settings: Config, folder: Path) -> Path:
    """A run of the command line, killed while one candidate is whole and another under way, and then resumed."""
    directory, file = folder / "run", folder / "sweep.yaml"
    file.write_text(json.dumps(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "moalign", "sweep", str(file), "--out", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(directory.glob("candidates/*/MANIFEST.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (directory / "front.json").exists()
    done = command_line.moalign("resume", directory)
    assert done.returncode == 0, done.stderr
    return directory

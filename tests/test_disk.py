"""A disk that refuses: errors that name the path, a full one told from all else, however a library says it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from interruptions import StopAfterCandidates
from safetensors import SafetensorError
from sweeps import small_config, write_pairs
from typer.testing import CliRunner

from moalign import cli, disk, registry, storage
from moalign.errors import NoSpaceError, RunError
from moalign.sweeps import run

RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), RUST])
def test_a_full_disk_is_told_from_wrong_input(tmp_path, error):
    said = pytest.raises(NoSpaceError, match=r"cannot write .*model: .*; make room for it")
    with said as caught, storage.new_directory(tmp_path / "model"):
        raise error
    assert caught.value.exit_code == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "gone"), ValueError("No space left"), KeyError(28)])
def test_what_is_no_full_disk_passes(error):
    with pytest.raises(type(error)) as caught, disk.space_for("somewhere"):
        raise error
    assert caught.value is error


def test_a_path_that_may_not_be_written_is_wrong_input():
    said = pytest.raises(RunError, match="cannot write there: not allowed; see to its permissions")
    with said as caught, disk.naming("there"):
        raise PermissionError(errno.EACCES, "not allowed")
    assert caught.value.exit_code == 2


def test_a_temporary_folder_that_there_is_no_place_for_is_said(monkeypatch):
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(RunError, match="cannot write a temporary folder: No usable"), disk.scratch():
        pass


def test_a_run_on_a_full_disk_says_how_to_go_on_and_does(tiny_model_path, tmp_path, monkeypatch):
    config = small_config(tiny_model_path, write_pairs(tmp_path / "pairs.jsonl"), train={"steps": 1, "together": 1})
    with pytest.raises(KeyboardInterrupt):
        run.start(config, tmp_path / "run", registry.discover(), StopAfterCandidates())
    real = storage.write_tensors

    def full(path: Path, *rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "write_tensors", full)
    done = CliRunner().invoke(cli.app, ["resume", str(tmp_path / "run")])
    assert isinstance(done.exception, NoSpaceError)
    assert f"stopped; moalign resume {tmp_path / 'run'} goes on from here" in done.stderr
    monkeypatch.setattr(storage, "write_tensors", real)
    assert not run.resume(tmp_path / "run", registry.discover(), StopAfterCandidates(99))["failed"]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs a file in memory")
def test_what_only_reads_works_on_a_full_disk():
    """Not one byte can be written anywhere."""
    asked = f"ulimit -f 0; exec {sys.executable} -m moalign front nowhere"
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere: no run.json in it")

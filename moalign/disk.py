"""What the disk refuses, as an error that names the path and says what to do."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moalign.errors import NoSpaceError, RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def naming(path: str | Path, action: str = "write") -> Iterator[None]:
    """Turn an error of the system into a RunError that names the path, a full disk into a NoSpaceError."""
    try:
        with space_for(path):
            yield
    except OSError as error:
        advice = "that it is there and may be read" if action == "read" else "to its permissions"
        raise RunError(f"cannot {action} {path}: {error.strerror or error}; see {advice}, then try again") from error


@contextmanager
def space_for(path: str | Path) -> Iterator[None]:
    """Raise NoSpaceError where whatever writes below the path finds the disk full; other errors pass."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, NoSpaceError) and _is_full(error):
            raise NoSpaceError(f"cannot write {path}: {os.strerror(errno.ENOSPC)}; make room for it") from error
        raise


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for what is needed for a while, where the system keeps such."""
    with ExitStack() as stack:
        with naming("a temporary folder"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="moalign-"))
        with space_for(folder):
            yield Path(folder)


def _is_full(error: Exception) -> bool:
    """Libraries in Rust say it in a text of their own."""
    numbers = isinstance(error, OSError) and error.errno in _FULL
    return numbers or any(f"(os error {number})" in str(error) for number in _FULL)

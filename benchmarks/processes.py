"""Processes of their own: with another allocator setting, or with memory in which nothing has happened yet."""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

# glibc reads these when a process starts. "tuned" keeps freed memory instead of handing every large block back to the
# kernel, which zeroes it page by page when it is asked for again.
ALLOCATORS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "tuned": {
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "8589934592",
        "MALLOC_TOP_PAD_": "268435456",
    },
}


class ChildError(Exception):
    """A child process failed; the message is its traceback."""


class Child:
    """``target(argument, connection)`` in a fresh Python process with an allocator setting and further variables."""

    def __init__(
        self, target: Callable[[Any, Connection], None], argument: object, allocator: str, **variables: str
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a new program, so that the allocator reads its settings
        self._connection, theirs = context.Pipe()
        with _environment({**dict.fromkeys(ALLOCATORS["tuned"]), **ALLOCATORS[allocator], **variables}):
            self._process = context.Process(target=_enter, args=(target, argument, theirs), daemon=True)
            self._process.start()
        theirs.close()

    def send(self, message: object) -> None:
        self._connection.send(message)

    def receive(self) -> tuple[str, Any]:
        """(kind, content) of the next message. Raises ChildError where the process failed or died."""
        try:
            kind, content = self._connection.recv()
        except EOFError:
            self._process.join()
            raise ChildError(f"the process ended with code {self._process.exitcode}") from None
        if kind == "failed":
            raise ChildError(content)
        return kind, content

    def result(self, on_progress: Callable[[str], None]) -> Any:
        """What the target sends as "result"; texts of "progress" before it are passed on."""
        while True:
            kind, content = self.receive()
            if kind == "result":
                return content
            on_progress(content)

    def close(self) -> None:
        """Whatever it was to give has been received; taking an interpreter down in order takes seconds."""
        self._connection.close()
        self._process.terminate()
        self._process.join()


def run_apart(target: Callable[[Any, Connection], None], argument: object, threads: int | None) -> Any:
    """The "result" of the target in a process of its own, with so many threads (None: torch's own choice)."""
    child = Child(target, argument, "default", **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    try:
        return child.result(lambda text: None)
    finally:
        child.close()


def in_turn(
    target: Callable[[Any, Connection], None], wanted: Sequence[Any], threads: int | None, before: Callable[[Any], None]
) -> Iterator[tuple[Any, Any]]:
    """Each of ``wanted`` with what the target sends as its "result", or the ChildError with which it failed.

    One process serves them all, in their order, as opening the libraries takes long; another follows where one fails,
    which must not take the others with it. ``before`` is told what comes next.
    """
    left = list(wanted)
    variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    while left:
        child = Child(target, tuple(left), "default", **variables)
        try:
            while left:
                before(left[0])
                _, found = child.receive()
                yield left.pop(0), found
        except ChildError as error:
            yield left.pop(0), error
        finally:
            child.close()


def _enter(target: Callable[[Any, Connection], None], argument: object, connection: Connection) -> None:
    try:
        target(argument, connection)
    except BaseException as error:
        connection.send(("failed", "".join(traceback.format_exception(error))))
    connection.close()


@contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    _apply(variables)
    try:
        yield
    finally:
        _apply(before)


def _apply(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def in_fork(function: Callable[[], Any]) -> Any:
    """The function's result (plain data) from a forked process. Call it before torch has started its threads."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = {"result": function()}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(sending, "w") as out:
            out.write(json.dumps(answer))
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as source:
        text = source.read()
    os.waitpid(child, 0)
    answer = json.loads(text) if text else {"error": "the process died, perhaps for want of memory"}
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["result"]

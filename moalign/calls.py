"""Which call into a plugin is under way: told to whoever watches this process, who may outlive it.

A plugin can end the process that it runs in, or never return. The process itself cannot tell of that, so it writes what
it is about to call into memory that it shares with its parent (``supervisor``).
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

HEADER = struct.Struct("<QQ")  # how often it was written, odd while it is being written; bytes of content
SIZE = 2**16
TOGETHER = "pass of several candidates"
IMPORT = "import"
CONSTRUCTOR = "its constructor"
ASKED_OF_ALL = (CONSTRUCTOR, "recognises")  # of readers that no configuration names
BACKWARD = "the backward pass of loss"
SAMPLE = "sample"  # of several candidates where it is for none


@dataclass(frozen=True)
class Call:
    """A call into a plugin, or the import of its module (``hook`` is then IMPORT).

    ``who`` names plugin, distribution and version. ``candidate`` is the one that the call is for, "" where it is for
    none. ``deadline`` is in seconds; None: it may take any time.
    """

    who: str
    distribution: str
    hook: str
    candidate: str = ""
    deadline: float | None = None
    kind: str = ""

    @property
    def what(self) -> str:
        """As part of a sentence: who does what, for whom."""
        if self.hook == IMPORT:
            return f"importing {self.who}"
        return f"{self.who}, in {self.hook}" + (f" for candidate {self.candidate}" if self.candidate else "")

    @property
    def dispensable(self) -> tuple[str, str] | None:
        """What the work can be done without, should the call have ended the process: a kind of thing and its name."""
        if self.hook == IMPORT and self.distribution != "moalign":
            return "distribution", self.distribution
        if self.kind == "reader" and self.hook in ASKED_OF_ALL:
            return "reader", self.who
        if self.hook == CONSTRUCTOR:
            return None  # somebody named it, and nothing is begun yet
        if self.kind == "observer":
            return "observer", self.who
        if self.hook in (BACKWARD, SAMPLE) and not self.candidate:
            return TOGETHER, ""
        return ("candidate", self.candidate) if self.candidate else None


@dataclass(frozen=True)
class Death:
    """What a call did to the process, as a sentence, and the place in the sources, if known."""

    call: Call
    how: str
    where: str = ""

    @property
    def reason(self) -> str:
        return f"{self.call.what}, {self.how}" + (f", at {self.where}" if self.where else "")


class Record:
    """The call under way, in memory that survives the process that writes it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SIZE)  # shared with the processes that this one forks
        self._number = 0
        self.current: Call | None = None

    def write(self, call: Call | None) -> None:
        content = b"" if call is None else _encoded(call)
        self._memory[: HEADER.size] = HEADER.pack(self._number + 1, len(content))
        self._memory[HEADER.size : HEADER.size + len(content)] = content
        self._number += 2
        self._memory[: HEADER.size] = HEADER.pack(self._number, len(content))
        self.current = call

    def read(self) -> tuple[int, Call | None]:
        """How often it was written, and the call under way; for another process than the one that writes."""
        while True:
            number, length = HEADER.unpack_from(self._memory)
            content = self._memory[HEADER.size : HEADER.size + length]
            if number % 2 == 0 and HEADER.unpack_from(self._memory) == (number, length):
                return number, Call(**json.loads(content)) if content else None
            time.sleep(1e-4)


@lru_cache(maxsize=1024)
def _encoded(call: Call) -> bytes:
    content = json.dumps(asdict(call)).encode()
    if len(content) > SIZE - HEADER.size:  # a name of thousands of letters
        content = json.dumps(asdict(Call(call.who[:1000], call.distribution[:1000], call.hook[:1000]))).encode()
    return content


_record: Record | None = None
_candidate = ""
_deaths: tuple[Death, ...] = ()


def watched_by(record: Record | None, deaths: tuple[Death, ...] = ()) -> None:
    """From now on this process tells ``record``; ``deaths`` ended those that were at the same work before it."""
    global _record, _deaths
    _record, _deaths = record, deaths


def begun() -> bool:
    """Whether an earlier process of this command had begun the run: candidates and observers come after that."""
    return any((death.call.dispensable or ("",))[0] in ("candidate", "observer", TOGETHER) for death in _deaths)


def deaths() -> tuple[Death, ...]:
    """What plugins did to earlier processes of this command, which this one has to do without them."""
    return _deaths


@contextmanager
def on_behalf_of(candidate: str) -> Iterator[None]:
    """Calls within the context are for this candidate."""
    global _candidate
    before, _candidate = _candidate, candidate
    try:
        yield
    finally:
        _candidate = before


@contextmanager
def under_way(call: Call) -> Iterator[None]:
    """Tell whoever watches that this call is under way, until the context is left."""
    if _record is None:
        yield
        return
    before = _record.current
    _record.write(call if call.candidate else replace(call, candidate=_candidate))
    try:
        yield
    finally:
        _record.write(before)

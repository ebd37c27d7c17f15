"""What the checks of all kinds share: the error, calling into a plugin, and a watch over global random state."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from moalign.errors import UserError

T = TypeVar("T")
FROZEN = (
    "write nothing into the plugin: its fields are its options, and it has no other state (that of a run belongs into "
    "the Watcher which an observer returns)"
)


class ConformanceError(AssertionError):
    """A plugin does not keep to the contract of its kind. Says what was tried, what came back, what to change."""


@dataclass(frozen=True)
class Review:
    """One plugin under review."""

    kind: str
    plugin: Any

    def fail(self, tried: str, got: str, change: str, cause: BaseException | None = None) -> NoReturn:
        who = type(self.plugin)
        text = (
            f"{self.kind} {who.__qualname__} ({who.__module__})\n  tried:  {tried}\n  got:    {got}\n  change: {change}"
        )
        raise ConformanceError(text) from cause

    def require(self, holds: bool, tried: str, got: str, change: str) -> None:
        if not holds:
            self.fail(tried, got, change)

    def call(self, tried: str, change: str, method: Callable[..., T], *arguments: Any) -> T:
        """Call into the plugin. A UserError, which refuses the input with a reason, is raised as it is."""
        _draw()
        before = _states()
        try:
            result = method(*arguments)
        except UserError:
            raise
        except Exception as error:
            self.fail(tried, described(error), FROZEN if _wrote_into_itself(error) else change, error)
        touched = [name for name, state in _states().items() if before.get(name, state) != state]
        self.require(
            not touched,
            tried,
            f"the global random state of {', '.join(touched)} is another than before",
            "draw from a generator of your own with a seed of its own; global generators belong to the host",
        )
        return result

    def answer(self, tried: str, change: str, method: Callable[..., T], *arguments: Any) -> T:
        """As ``call``, where there is nothing to refuse."""
        try:
            return self.call(tried, change, method, *arguments)
        except UserError as error:
            self.fail(tried, described(error), change, error)


def run(checks: Sequence[Callable[[T], None]], trial: T, exempt: Collection[str]) -> None:
    """All checks but those that are exempt. Raises ConformanceError, and ValueError for an unknown exemption."""
    names = [check.__name__ for check in checks]
    unknown = sorted(set(exempt) - set(names))
    if unknown:
        raise ValueError(f"exempt: there is no check '{unknown[0]}'; there are {', '.join(names)}")
    with _states_of_our_own():
        for name, check in zip(names, checks, strict=True):
            if name not in exempt:
                try:
                    check(trial)
                except ConformanceError as error:
                    raise ConformanceError(f"{error}\n  check:  {name}") from error.__cause__


def described(error: BaseException) -> str:
    """Kind and message on one line."""
    if isinstance(error, ValidationError):  # pydantic's own text has an address and the whole input
        found = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return f"ValidationError of {error.title}: {found}"
    return " ".join(f"{type(error).__name__}: {error}".split()) if str(error) else type(error).__name__


def first(what: str, places: Sequence[int]) -> str:
    """``pair 3``, or ``no pair``."""
    return f"{what} {places[0]}" if places else f"no {what}"


def short(value: object) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _wrote_into_itself(error: Exception) -> bool:
    return isinstance(error, ValidationError) and error.errors()[0]["type"] == "frozen_instance"


def _states() -> dict[str, object]:
    """The state of every global generator; torch's only where torch is loaded."""
    import numpy

    kind, keys, *rest = numpy.random.get_state(legacy=True)
    states: dict[str, object] = {
        "random": random.getstate(),
        "numpy.random": (kind, numpy.asarray(keys).tobytes(), *rest),
    }
    if "torch" in sys.modules:
        states["torch"] = bytes(sys.modules["torch"].get_rng_state().numpy())
    return states


def _draw() -> None:
    """Move every global generator on, so that seeding it anew, even to the same seed at every call, is seen."""
    import numpy

    random.random()
    numpy.random.random()
    if "torch" in sys.modules:
        sys.modules["torch"].rand(())


@contextmanager
def _states_of_our_own() -> Iterator[None]:
    """After it, the global generators stand where they stood before."""
    import numpy

    torch = sys.modules.get("torch")
    kept = random.getstate(), numpy.random.get_state(), None if torch is None else torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        numpy.random.set_state(kept[1])
        if torch is not None and kept[2] is not None:
            torch.set_rng_state(kept[2])

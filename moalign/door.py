"""Every call into a plugin passes here: it is announced, and what it breaks is an error that names it.

What a plugin may not do to others: end or hang the process (``calls`` and ``supervisor``), change what it is given, and
leave the global random generators other than it found them.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from moalign.api import (
    Combiner,
    Conditioner,
    Decoder,
    Filter,
    Objective,
    Plugin,
    Reference,
    RewardModel,
    Search,
    Transform,
)
from moalign.calls import Call, under_way
from moalign.errors import MoalignError, PluginError

# their methods are functions of their arguments, by contract
PURE = (Objective, Combiner, Search, Transform, Decoder, Conditioner, RewardModel, Reference, Filter)
# asked when the input has been found good: no error is the user's
ON_GOOD_INPUT = (
    *("pair_terms", "loss", "parameters", "measure", "token_advantages"),
    *("score", "apply", "sample", "scores", "draw", "gates", "moves", "keep_responses", "keep_pairs"),
)


@dataclass(frozen=True)
class Origin:
    """Where a plugin comes from, and how many seconds a call into it may take (None: any)."""

    kind: str
    name: str
    distribution: str
    version: str
    deadline: float | None = None

    @property
    def who(self) -> str:
        return f"{self.kind} '{self.name}' of {self.distribution} {self.version}".rstrip()

    def call(self, hook: str, candidate: str = "") -> Call:
        return Call(self.who, self.distribution, hook, candidate, self.deadline, self.kind)


def origin(plugin: Plugin) -> Origin:
    """As the registry noted it; for a plugin that somebody made by hand, its class."""
    known = getattr(plugin, "_origin", None)
    if isinstance(known, Origin):
        return known
    kind = next((_kind(base.__name__) for base in type(plugin).__mro__ if Plugin in base.__bases__), "")
    return Origin(kind or "plugin", type(plugin).__name__, type(plugin).__module__, "")


def _kind(base: str) -> str:
    """As the registry calls it: RewardModel is reward-model."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", base).lower()


def call(
    plugin: Plugin,
    hook: str,
    *arguments: Any,
    candidate: str = "",
    thorough: bool = True,
    then: Callable[[Any], Any] | None = None,
    on: Any = None,
) -> Any:
    """What the plugin's method returns, or what ``then`` makes of it, such as a list of what yields: still its call.

    ``thorough``: look after all generators, not torch's alone, which takes 0.1 ms. ``on``: whose method it is, if not
    the plugin's own.

    Raises PluginError naming plugin, distribution, version and hook for whatever the method raises, except input errors
    of moalign's own where there is no candidate yet, and for want of memory; where it changes a tensor that it was
    given; and, for methods that are functions of their arguments, where it touches the global random generators. Their
    state is put back in any case.
    """
    source = origin(plugin)
    versions = [tensor._version for tensor in _tensors(arguments)]
    with kept_generators(thorough) as touched, guarded(source, hook, candidate):
        result = _awaited(getattr(plugin if on is None else on, hook)(*arguments))
        result = result if then is None else then(result)
    if touched and isinstance(plugin, PURE):
        raise PluginError(
            f"{source.who}, in {hook}: it used the global random generator of {' and '.join(touched)}, so that its "
            "result depends on what else runs; draw from a generator of its own, seeded from its arguments"
        )
    if versions != [tensor._version for tensor in _tensors(arguments)]:
        raise PluginError(f"{source.who}, in {hook}: it changed a tensor that it was given; compute a new one")
    return result


@contextmanager
def guarded(source: Origin, hook: str, candidate: str = "") -> Iterator[None]:
    """A call under way; what is raised within is an error that names the plugin."""
    try:
        with under_way(source.call(hook, candidate)):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit and what a stranger may derive from BaseException
        raise as_plugin_error(error, source, hook) from error


def iterate(plugin: Plugin, hook: str, *arguments: Any) -> Iterator[Any]:
    """The items of a method that yields, each of them a call under way. What it raises goes through."""
    source = origin(plugin)
    with kept_generators():
        with under_way(source.call(hook)):
            items = iter(getattr(plugin, hook)(*arguments))
        while True:
            with under_way(source.call(hook)):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


def _awaited(result: Any) -> Any:
    """What a coroutine function returns in the end; awaited in another thread where this one has a loop (notebooks)."""
    if not inspect.iscoroutine(result):
        return result
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(result)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, result).result()


def as_plugin_error(error: BaseException, source: Origin, hook: str) -> BaseException:
    """The error that names the plugin; the error itself where it is about the user's input, or for want of memory."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return error
    if hook not in ON_GOOD_INPUT and isinstance(error, MoalignError) and not isinstance(error, PluginError):
        return error  # such as a DataError: it says whose fault it is
    what = str(error) if isinstance(error, PluginError) else described(error)
    return PluginError(f"{source.who}, in {hook}: {what}")


def described(error: BaseException) -> str:
    """Type and message of a stranger's error."""
    try:
        message = str(error)
    except Exception:
        message = "its message cannot be shown"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _tensors(arguments: Iterable[Any]) -> Iterator[Any]:
    """The tensors among the fields of the arguments that are records, such as Batch and PairTerms."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    for argument in arguments:
        values = [getattr(argument, each.name) for each in fields(argument)] if is_dataclass(argument) else [argument]
        values += [each for value in values if isinstance(value, Mapping) for each in value.values()]
        yield from (value for value in values if isinstance(value, torch.Tensor))


def _generators(thorough: bool) -> dict[str, Any]:
    """The state of the global generators of the libraries that are loaded."""
    found: dict[str, Any] = {}
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].random.get_rng_state()
    if thorough:
        found["random"] = random.getstate()
    if thorough and "numpy" in sys.modules:
        found["numpy"] = sys.modules["numpy"].random.get_state()
    return found


@contextmanager
def kept_generators(thorough: bool = True) -> Iterator[list[str]]:
    """Give the global generators their state again; afterwards the list holds the names of those that had another."""
    touched: list[str] = []
    before = _generators(thorough)
    try:
        yield touched
    finally:
        touched += _put_back(before)


def _put_back(before: dict[str, Any]) -> list[str]:
    touched = []
    after = _generators("random" in before)
    if "torch" in before and not sys.modules["torch"].equal(before["torch"], after["torch"]):
        sys.modules["torch"].random.set_rng_state(before["torch"])
        touched.append("torch")
    if "random" in before and after["random"] != before["random"]:
        random.setstate(before["random"])
        touched.append("random")
    if "numpy" in before and not _same_numpy(before["numpy"], after["numpy"]):
        sys.modules["numpy"].random.set_state(before["numpy"])
        touched.append("numpy")
    return touched


def _same_numpy(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[0] == other[0] and bool((one[1] == other[1]).all()) and one[2:] == other[2:]

"""The hooks of the plugin door, and what may be wrong with a plugin's side of them.

pluggy matches hooks and arguments by name and ignores a function without the marker; here each of these mistakes is
an error that shows the line as it should be.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from moalign.api import API_VERSION, Register, hookspec
from moalign.errors import PluginError
from moalign.validation import nearest

VERSION_ATTRIBUTE = "moalign_api_version"


class NewerAPIError(PluginError):
    """A plugin asks for a version of the hooks that this moalign does not have."""


class HookSpecifications:
    """One hook per kind; a plugin implements those that it has something for."""

    @hookspec
    def register_objectives(self, register: Register) -> None:
        """Register losses on token log-probabilities."""

    @hookspec
    def register_combiners(self, register: Register) -> None:
        """Register rules that turn many objectives and a preference into one signal."""

    @hookspec
    def register_rewards(self, register: Register) -> None:
        """Register scorers of responses."""

    @hookspec
    def register_transforms(self, register: Register) -> None:
        """Register what shapes the rewards of sampled responses."""

    @hookspec
    def register_searches(self, register: Register) -> None:
        """Register searches over preferences."""

    @hookspec
    def register_readers(self, register: Register) -> None:
        """Register dataset formats."""

    @hookspec
    def register_observers(self, register: Register) -> None:
        """Register trackers and whatever else watches a run."""

    @hookspec
    def register_samplers(self, register: Register) -> None:
        """Register where sampled responses come from."""

    @hookspec
    def register_decoders(self, register: Register) -> None:
        """Register what steers trained candidates while they speak."""

    @hookspec
    def register_conditioners(self, register: Register) -> None:
        """Register how a preference reaches one model that is trained for many."""

    @hookspec
    def register_reward_models(self, register: Register) -> None:
        """Register forms of reward models that are trained on judgements."""

    @hookspec
    def register_references(self, register: Register) -> None:
        """Register which policy a loss compares with."""

    @hookspec
    def register_filters(self, register: Register) -> None:
        """Register which of the sampled responses are trained on."""


def specifications() -> dict[str, tuple[str, ...]]:
    """Every hook with the names of its arguments."""
    marked = {name: hook for name, hook in vars(HookSpecifications).items() if hasattr(hook, "moalign_spec")}
    return {name: tuple(inspect.signature(hook).parameters)[1:] for name, hook in marked.items()}


def check(plugin: Any) -> None:
    """Raise PluginError where what an entry point names was written for a newer API or implements no hook as it is."""
    _check_version(plugin)
    known = specifications()
    faults, found = [], False
    for name, function, options in _functions(plugin):
        hook = (options or {}).get("specname") or name
        if options is None:
            if hook in known:
                faults.append(f"`{hook}` is never called: it lacks the marker; write @hookimpl above `{_line(hook)}`")
        elif hook in known:
            found = True
            faults += _wrong_arguments(hook, function, known[hook])
        elif not options.get("optionalhook"):
            guess = nearest(hook, known).removeprefix("; ")
            right = next((_line(name) for name in known if f"'{name}'" in guess), "")
            faults.append(f"there is no hook `{hook}`; " + (f"did you mean `{right}`?" if right else guess))
    if not faults and not found:
        faults.append(f"it implements no hook; known: {', '.join(_line(name) for name in known)}")
    if faults:
        raise PluginError("; ".join(faults))


def _check_version(plugin: Any) -> None:
    version = getattr(plugin, VERSION_ATTRIBUTE, API_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PluginError(f"{VERSION_ATTRIBUTE} is {version!r}; write the number of an API, such as {API_VERSION}")
    if version > API_VERSION:
        raise NewerAPIError(
            f"it is written for version {version} of the plugin API, and this moalign has version {API_VERSION}"
        )


def _functions(plugin: Any) -> Iterator[tuple[str, Any, dict[str, Any] | None]]:
    """(name, function, options of its @hookimpl or None) of what ``plugin``, a module or an object, has."""
    for name in dir(plugin):
        function = getattr(plugin, name, None)
        if inspect.isroutine(function):
            options = getattr(function, "moalign_impl", None)
            yield name, function, options if isinstance(options, dict) else None


def _wrong_arguments(hook: str, function: Any, arguments: tuple[str, ...]) -> list[str]:
    """An implementation may take fewer arguments than the hook offers, but one that registers needs ``register``."""
    parameters = inspect.signature(function).parameters
    plain = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    fits = len(plain) == len(parameters) and set(plain) <= set(arguments)
    if fits and (plain or not hook.startswith("register_")):
        return []
    written = ", ".join(str(parameter) for parameter in parameters.values())
    return [f"`{hook}({written})` has the wrong arguments; the hook is `{_line(hook)}`"]


def _line(hook: str) -> str:
    return f"{hook}({', '.join(specifications()[hook])})"


def check_methods(plugin: type, base: type) -> None:
    """Raise PluginError where a plugin's own method cannot be called as its kind is called."""
    for name, known in vars(base).items():
        if name.startswith("_") or not inspect.isfunction(known):
            continue
        method = inspect.getattr_static(plugin, name)
        if method is known:
            continue
        names = list(inspect.signature(known).parameters)
        try:
            signature = inspect.signature(getattr(plugin, name))
            signature.bind(*(names[1:] if isinstance(method, staticmethod | classmethod) else names))
        except TypeError:
            right = f"def {name}({', '.join(names)})"
            raise PluginError(f"`{name}{signature}` has the wrong arguments; write `{right}`") from None
        except ValueError:
            continue  # written in C, without a signature

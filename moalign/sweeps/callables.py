"""Rewards that are Python callables: plugins of one process, made from what ``moalign.sweep`` is given.

The run directory keeps the name "python:OBJECTIVE()", which nothing can be imported by. To go on with such a run is to
give the callable again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moalign.api import Reward
from moalign.config import Config, PluginChoice
from moalign.errors import ConfigError, RunError
from moalign.registry import Entry, Registry
from moalign.types import Sample
from moalign.validation import nearest

Scores = Sequence[float | None]
RewardFunction = Callable[[Sequence[Sample]], Scores | Awaitable[Scores]]

DISTRIBUTION = "python"


def installed(registry: Registry, rewards: Mapping[str, RewardFunction]) -> Registry:
    """The registry, with a reward plugin for each callable. Raises ConfigError for what cannot be called."""
    return replace(registry, entries=(*registry.entries, *(_entry(name, each) for name, each in rewards.items())))


def chosen(config: Config, rewards: Mapping[str, RewardFunction]) -> Config:
    """The configuration, with these as the rewards of their objectives. Raises ConfigError where that cannot be."""
    for name, spec in config.objectives.items():
        if name in rewards and spec.reward is not None:
            raise ConfigError(f"objectives.{name}.reward: stands in the configuration, and a callable is given for it")
    return replaced(config, rewards)


def replaced(config: Config, rewards: Mapping[str, RewardFunction]) -> Config:
    """The configuration, with these in the place of its objectives' rewards. Raises ConfigError for another name."""
    objectives = dict(config.objectives)
    for name in rewards:
        if name not in objectives:
            raise ConfigError(f"rewards: there is no objective '{name}'{nearest(name, objectives)}")
        objectives[name] = objectives[name].model_copy(update={"reward": PluginChoice(name=_full_name(name))})
    return config.model_copy(update={"objectives": objectives})


def check(config: Config, registry: Registry, directory: Path) -> None:
    """Raise RunError where the rewards of the run were callables and are not, or other ones, now."""
    given = {entry.full_name for entry in registry.of_kind("reward") if entry.distribution == DISTRIBUTION}
    wanted = {name: _full_name(name) for name in config.objectives if is_callable(config, name)}
    missing = [name for name, full_name in wanted.items() if full_name not in given]
    if missing:
        asked = ", ".join(f'"{name}": ...' for name in sorted(wanted))
        raise RunError(
            f"{directory}: the reward of {missing[0]} was a Python callable, which is not in the run directory; go on "
            f'from Python, with the same: moalign.resume("{directory}", rewards={{{asked}}})'
        )
    if extra := sorted(given - set(wanted.values())):
        raise RunError(f"{directory}: {extra[0]} is given as a reward, and no callable was when this run was started")


def is_callable(config: Config, objective: str) -> bool:
    """Whether the objective's reward is, or was when the run was started, a Python callable."""
    reward = config.objectives[objective].reward
    return reward is not None and reward.name == _full_name(objective)


def _full_name(objective: str) -> str:
    return f"{DISTRIBUTION}:{objective}()"


def _entry(objective: str, function: RewardFunction) -> Entry:
    if not callable(function):
        what = type(function).__name__
        raise ConfigError(f"rewards: that of {objective} is a {what}; give a function of samples, or name a plugin")
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return Entry("reward", f"{objective}()", _plugin(function), f"the Python callable {name}", "", DISTRIBUTION, "")


def _plugin(function: RewardFunction) -> type[Reward]:
    class PythonCallable(Reward):
        """Asks the callable, whose attribute ``deterministic`` and method ``pessimistic`` count, if it has them."""

        deterministic = getattr(function, "deterministic", True)

        def score(self, samples: Sequence[Sample]) -> Any:
            return function(samples)

        def pessimistic(self) -> bool:
            asked = getattr(function, "pessimistic", None)
            return bool(asked()) if callable(asked) else False

    # whose file a resumed run is compared with
    PythonCallable.__module__ = getattr(function, "__module__", None) or type(function).__module__
    return PythonCallable

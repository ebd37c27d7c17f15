"""Everything about a reward model that can be known, and refused, before a model is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moalign import door
from moalign.api import Reader, RewardModel
from moalign.config import BUILT_IN_MODEL
from moalign.errors import ConfigError, PluginError
from moalign.registry import Entry, Registry
from moalign.reward_models.config import RewardModelConfig
from moalign.sweeps.checks import check_files
from moalign.sweeps.plan import readers_for

SUPPLIED = frozenset({"final", "context", "pairs", "rewards", "logps", "reference"})


@dataclass(frozen=True)
class Plan:
    """A validated configuration with its plugins built. ``compares``: the form learns from pairs, else from scores."""

    config: RewardModelConfig
    form: RewardModel
    readers: Mapping[str, Reader]
    plugins: tuple[Entry, ...]

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.config.objective_names

    @property
    def compares(self) -> bool:
        return "pairs" in self.form.needs


def prepare(config: RewardModelConfig, registry: Registry) -> Plan:
    """Raises ConfigError, UnknownPluginError, PluginError, ModelError (a directory that is no model)."""
    choice, deadline = config.reward_model, config.plugin_deadline
    form = registry.build("reward-model", choice.name, choice.options, "reward_model", deadline)
    if unknown := form.needs - SUPPLIED:
        raise PluginError(
            f"reward-model '{choice.name}' needs '{min(unknown)}', which the engine does not supply; it supplies "
            f"{', '.join(sorted(SUPPLIED))}"
        )
    if config.data.path == BUILT_IN_MODEL:
        raise ConfigError("data.path: the built-in prompts have no judgements; name a file that has")
    if config.data.margins != "auto":
        raise ConfigError("data.margins: a reward model learns from what the data says; leave it out")
    if config.train.posterior is not None:
        raise ConfigError("train.posterior: a reward model keeps no deviation of its weights; leave it out")
    door.call(form, "check", config.objective_names)
    readers = readers_for(config.data.reader, registry, deadline)
    entries = [registry.find("reward-model", choice.name)]
    if config.data.reader.name != "auto":
        entries.append(registry.find("reader", config.data.reader.name))
    check_files(config)
    return Plan(config, form, readers, tuple(entries))

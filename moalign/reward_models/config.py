"""The configuration of a reward model: the sections that a sweep has too, the form, and how many members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moalign import config as configuration
from moalign.config import Choice, PluginChoice, Section, Shared, TrainSettings
from moalign.errors import ConfigError


class JudgedSettings(Section):
    direction: Literal["max", "min"] = "max"
    """min: scores are negated once, when they are read"""


class RewardModelConfig(Shared):
    objectives: dict[str, JudgedSettings] = Field(min_length=1)
    """named, one score for each; the order does not matter"""
    reward_model: Choice = PluginChoice(name="bradley-terry")
    """the form, with its options: `moalign plugins list --kind reward-model`"""
    members: int = Field(default=1, ge=1)
    """trained side by side from other first values and in another order of the data; more than one is an ensemble"""
    train: TrainSettings = TrainSettings()


def load(path: str | Path, overrides: Sequence[str] = ()) -> RewardModelConfig:
    """As ``moalign.config.load``. Raises ConfigError naming file and line, and every bad key."""
    if not Path(path).exists():
        raise ConfigError(f"{path}: no such file; docs/reward-models.md has a configuration to start from")
    return from_mapping(configuration.read(path), overrides, where=str(Path(path)))


def from_mapping(
    content: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "configuration"
) -> RewardModelConfig:
    """Validate a mapping as ``load`` does for a file."""
    return configuration.validated(RewardModelConfig, content, overrides, where)

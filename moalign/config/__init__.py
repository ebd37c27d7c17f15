"""The configuration: one validated, frozen value. What a plugin's options mean, the plugin says."""

from __future__ import annotations

from moalign.config.reading import CHOICES, from_mapping, load, read, validated
from moalign.config.sections import (
    BUILT_IN_DIRECTORY,
    BUILT_IN_MODEL,
    PLUGIN_DEADLINE,
    BudgetSettings,
    Choice,
    Config,
    DataSettings,
    EarlyStopSettings,
    EvaluateSettings,
    LoraSettings,
    ModelSettings,
    ObjectiveSettings,
    PluginChoice,
    RolloutSettings,
    SearchChoice,
    Section,
    Shared,
    TrainSettings,
)

__all__ = [
    "BUILT_IN_DIRECTORY",
    "BUILT_IN_MODEL",
    "CHOICES",
    "PLUGIN_DEADLINE",
    "BudgetSettings",
    "Choice",
    "Config",
    "DataSettings",
    "EarlyStopSettings",
    "EvaluateSettings",
    "LoraSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "PluginChoice",
    "RolloutSettings",
    "SearchChoice",
    "Section",
    "Shared",
    "TrainSettings",
    "from_mapping",
    "load",
    "read",
    "validated",
]

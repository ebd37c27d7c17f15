"""What a search may change for a single candidate: how it is trained, its loss's options, rank, alpha and seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from moalign import config as configuration
from moalign.api import Objective
from moalign.config import Config, LoraSettings, TrainSettings
from moalign.errors import ConfigError
from moalign.validation import explain, nearest

_OF_THE_PASS = {"together", "tokens_per_pass", "gradient_checkpointing"}  # the same for all candidates in it
_OF_THE_RUN = {"posterior"}  # any of its candidates can be combined with any
CHANGEABLE = frozenset(
    f"train.{key}" for key in TrainSettings.model_fields if key not in _OF_THE_PASS | _OF_THE_RUN
) | {
    "model.lora.r",
    "model.lora.alpha",
    "seed",
}


@dataclass(frozen=True)
class Variant:
    """How one candidate is trained."""

    objective: Objective
    train: TrainSettings
    lora: LoraSettings
    seed: int

    @property
    def beta(self) -> float:
        """Of the loss, for implicit rewards; 1 where the loss has none."""
        return float(getattr(self.objective, "beta", 1.0))


def variant(config: Config, objective: Objective, changes: Mapping[str, Any]) -> Variant:
    """The configuration with a candidate's changes. Raises ConfigError naming the key."""
    options = {key.removeprefix("loss."): value for key, value in changes.items() if key.startswith("loss.")}
    others = {key: value for key, value in changes.items() if not key.startswith("loss.")}
    for key in others:
        if key not in CHANGEABLE:
            raise ConfigError(f"{key}: cannot differ between candidates{nearest(key, CHANGEABLE)}")
    if others:
        overrides = [f"{key}={json.dumps(value)}" for key, value in others.items()]
        config = configuration.from_mapping(config.model_dump(mode="json"), overrides, where="changes")
    if options:
        kind = type(objective)
        try:
            changed = kind(**objective.model_dump() | options)
        except ValidationError as error:
            raise ConfigError(explain(error, kind, "loss")) from None
        changed._origin = objective._origin
        objective = changed
    return Variant(objective, config.train, config.model.lora, config.seed)

"""Rewards that go with the direction of their objective."""

from __future__ import annotations

from collections.abc import Mapping

from moalign import door
from moalign.api import Reward
from moalign.config import Config
from moalign.errors import ConfigError


def check(config: Config, rewards: Mapping[str, Reward]) -> None:
    """Raises ConfigError where scores are negated after their reward has taken off for doubt, which would add it."""
    for name, reward in rewards.items():
        spec = config.objectives[name]
        if spec.reward is not None and spec.direction == "min" and door.call(reward, "pessimistic"):
            raise ConfigError(
                f"objectives.{name}.direction: min negates the scores, and what reward '{spec.reward.name}' takes off "
                "for doubt would make them better; combine its members by their mean, or use a head for which larger "
                "is better, with direction: max (one that was trained with direction: min is such a head)"
            )

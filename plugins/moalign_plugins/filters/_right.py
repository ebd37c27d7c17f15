"""What the filters that know right responses share: whose rewards say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moalign.api import ConfigError, Sampled

if TYPE_CHECKING:
    from torch import Tensor


def check_objective(name: str | None, objectives: Sequence[str], key: str) -> None:
    """Raise ConfigError where there is no such objective."""
    if name is not None and name not in objectives:
        raise ConfigError(f"rollouts.filter.{key}: there is no objective '{name}'; there are {', '.join(objectives)}")


def rewards_of(about: Sampled, objective: str | None) -> Tensor:
    """Of one objective as they were scored, or (None) combined; [N]."""
    return about.signal if objective is None else about.rewards[:, about.objectives.index(objective)]

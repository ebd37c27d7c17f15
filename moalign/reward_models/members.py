"""A trained member of a reward model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moalign.engine.trainee import Trained


@dataclass(frozen=True)
class Member:
    """The slot of its adapter, the tensors of its head, and what the training says of itself."""

    name: str
    slot: str
    seed: int
    parameters: Mapping[str, Tensor]
    trained: Trained
    metrics: tuple[dict[str, Any], ...]

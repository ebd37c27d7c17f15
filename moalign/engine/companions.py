"""A second adapter that a loss has trained beside the candidate's: on the same batches, in the same passes.

It is a trainee like any other, but for its batches, which are those of the candidate that it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moalign import door
from moalign.api import Objective
from moalign.data.dataset import PairDataset
from moalign.engine import owned
from moalign.engine.batches import RolloutSource
from moalign.engine.reference_policy import FrozenPolicy
from moalign.engine.trainee import Trainee
from moalign.errors import PluginError, TrainingError
from moalign.seeds import derive

NAME = "companion"  # among the guides of the loss, and of the folder beside the candidate's adapter
SUPPLIED = frozenset({"groups", "reference"})


@dataclass
class Following:
    """The batches of another trainee."""

    leader: Trainee
    cacheable: bool = False

    def at(self, step: int) -> tuple[PairDataset, np.ndarray]:
        return self.leader.source.at(step)


def companion_of(objective: Objective, candidate: str = "") -> Objective | None:
    """The loss of the second adapter. Raises PluginError where it is none, or wants what its batches do not have."""
    found: Any = door.call(objective, "companion", candidate=candidate)
    if found is None:
        return None
    who = f"{door.origin(objective).who}, in companion"
    if not isinstance(found, Objective):
        raise PluginError(f"{who}: it must return a moalign.api.Objective or None, not {type(found).__name__}")
    if "token_advantages" not in objective.wants:
        raise PluginError(f"{who}: only a loss that needs token_advantages, which measures a round, has a companion")
    if "groups" not in found.wants or not found.wants <= SUPPLIED:
        raise PluginError(f"{who}: it needs {', '.join(sorted(found.wants))}; it is to need groups, or reference too")
    found._origin = door.origin(objective)  # errors name the plugin that the configuration names
    return found


def slot_of(leader: str) -> str:
    """Where the companion of the adapter in the slot ``leader`` lies."""
    return f"{NAME}-{leader}"


def beside(trainees: Sequence[Trainee]) -> list[Trainee]:
    """All of them, each behind its companion where its loss has one, so that the figures of a step are told in time."""
    found = []
    for leader in trainees:
        objective = None if leader.error is not None else companion_of(leader.job.objective, leader.job.candidate)
        found += [leader] if objective is None else [_companion(leader, objective), leader]
    return found


def share_errors(trainees: Sequence[Trainee]) -> None:
    """Where one of the two has failed the other has no use."""
    for trainee in trainees:
        if isinstance(trainee.source, Following):
            leader = trainee.source.leader
            if trainee.error is not None and leader.error is None:
                leader.error = TrainingError(f"the adapter that its loss trains beside it: {trainee.error}")
            trainee.error = trainee.error or leader.error


def _companion(leader: Trainee, objective: Objective) -> Trainee:
    """With the leader's settings and a learning rate of its own, from fresh weights or those of the parent's."""
    job, source, slot = leader.job, leader.source, slot_of(leader.slot)
    if not isinstance(source, RolloutSource):
        raise PluginError(f"{door.origin(objective).who}, in companion: there are no rounds of sampled responses")
    source.guides = {**source.guides, NAME: FrozenPolicy(slot, slot, fixed=False)}
    lr = job.settings.lr * owned.lr_factor(job.objective, NAME, job.candidate)
    own = replace(
        job,
        objective=objective,
        needs=objective.wants,
        settings=job.settings.model_copy(update={"lr": lr, "early_stop": None, "posterior": None}),
        seed=derive(job.seed, NAME),
        guides={},
        reference=None,
        held_out=None,
    )

    def told(step: int, metrics: dict[str, Any]) -> None:
        figures = {name: metrics.get(name) for name in ("loss", "gradient_norm")}
        source.figures |= {f"{NAME}/{name}": float(value) for name, value in figures.items() if value is not None}

    return Trainee(own, Following(leader), slot, told, _of(leader.parent))


def _of(parent: Path | None) -> Path | None:
    """The companion of the adapter from which training starts, where it has one."""
    return parent / NAME if parent is not None and (parent / NAME).is_dir() else None

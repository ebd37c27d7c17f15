"""What the tests of losses with parameters of their own share: small runs of a loss with a value head."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sweeps import small_config

from moalign.api import Objective
from moalign.config import Config
from moalign.engine.batches import RolloutSource
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate, Preference

STEPS = 12  # three to a round
ROLLOUTS = {"rounds": 4, "samples": 3, "prompts": 5, "prompts_per_step": 4, "max_new_tokens": 5}
LOSS = {"name": "ppo", "beta": 0.1, "missing_end": -3.0}  # so that equal weights on opposite rewards are not nothing
CANDIDATES = [
    Candidate(f"c{number}", Preference("weights", {"harmless": share, "helpful": 1 - share}))
    for number, share in enumerate((0.0, 0.4, 1.0))
]
NAMES = slots(3)


def write_prompts(file: Path) -> Path:
    file.write_text("".join(json.dumps({"prompt": f"q{'x' * (number % 3)}{number}: "}) + "\n" for number in range(12)))
    return file


def settings_of(model_path: Path, prompts: Path, **changes: Any) -> Config:
    online: dict[str, Any] = {
        "objectives": {"helpful": {"reward": "length"}, "harmless": {"reward": "length", "direction": "min"}},
        "train": {"steps": STEPS, "lr": 2e-3, "together": 2},
        "rollouts": ROLLOUTS,
        "loss": LOSS,
    }
    return small_config(model_path, prompts, **(online | changes))


def trainee_of(
    workshop: Workshop, candidate: Candidate, slot: str, told: list[dict[str, Any]] | None = None
) -> Trainee:
    told = [] if told is None else told
    source = batch_source(candidate, workshop, slot)
    return Trainee(job_of(candidate, workshop, ()), source, slot, lambda step, metrics: told.append(metrics))


def trained(workshop: Workshop, trainees: list[Trainee]) -> None:
    workshop.first_round.clear()
    train_together(workshop.model, trainees, workshop.cache, workshop.accelerator)
    assert [trainee.error for trainee in trainees] == [None] * len(trainees)


def errors_of(workshop: Workshop, trainee: Trainee) -> Trainee:
    """After its training, which must have failed."""
    workshop.first_round.clear()
    train_together(workshop.model, [trainee], workshop.cache, workshop.accelerator)
    assert trainee.error is not None
    return trainee


def with_objective(trainee: Trainee, objective: Objective) -> Trainee:
    assert isinstance(trainee.source, RolloutSource) and trainee.source.advantages is not None
    trainee.source.advantages.objective = objective
    trainee.job = replace(trainee.job, objective=objective, needs=frozenset(objective.needs))
    return trainee

"""One candidate trained with a reference, on the tiny model's pairs or on responses of the built-in assistant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sweeps import small_config, write_pairs
from torch import Tensor

from moalign import config, lora, registry
from moalign.api import Candidate, Preference, Reference
from moalign.config import Config
from moalign.engine.reference_policy import BASE, FrozenPolicy
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop

HALF = Candidate("half", Preference("weights", {"harmless": 0.5, "helpful": 0.5}))


def opened(settings: Config) -> Workshop:
    return open_workshop(prepare(settings, registry.discover()), Path(), Observer(), keep_cache=False)


def offline(model_path: Path, folder: Path, **changes: Any) -> Workshop:
    """Pairs of letters and digits."""
    pairs = write_pairs(folder / "pairs.jsonl")
    train = {"steps": 6, "pairs_per_step": 4, "lr": 1e-2, "schedule": "constant", "warmup": 0}
    return opened(small_config(model_path, pairs, **{"train": train, "loss": {"name": "dpo", "beta": 0.3}} | changes))


def online_content(**changes: Any) -> dict[str, Any]:
    names = ("helpful", "harmless")
    return {
        "model": {"path": "tiny-assistant", "lora": {"r": 4, "alpha": 8}},
        "objectives": {name: {"reward": {"name": "tiny-assistant", "objective": name}} for name in names},
        "rollouts": {"rounds": 3, "prompts": 3, "samples": 4, "prompts_per_step": 2, "max_new_tokens": 8},
        "loss": {"name": "rebel", "beta": 0.1},
        "search": {"name": "grid", "points": 2},
        "train": {"steps": 6, "lr": 1e-2, "schedule": "constant", "warmup": 0, "together": 2},
        "evaluate": {"samples": 1, "prompts": 2, "max_new_tokens": 8},
    } | changes


def online(**changes: Any) -> Workshop:
    """Responses that the built-in assistant samples."""
    return opened(config.from_mapping(online_content(**changes)))


def built(name: str, **options: Any) -> Reference:
    return registry.discover().build("reference", name, options, "reference")


class Told:
    """What a training has told of its steps."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def __call__(self, step: int, values: dict[str, Any]) -> None:
        self.steps.append(values)

    def of(self, name: str) -> list[Any]:
        return [each.get(name) for each in self.steps]

    @property
    def losses(self) -> list[Any]:
        return self.of("loss")


def trained(
    workshop: Workshop,
    *references: Reference | None,
    begins_with: FrozenPolicy = BASE,
    candidate: Candidate = HALF,
    parent: Path | None = None,
    **job: Any,
) -> list[tuple[dict[str, Tensor], Told]]:
    """Adapter and metrics of a candidate for each reference, all trained in one pass."""
    workshop.first_round.clear()
    trainees = []
    for reference, slot in zip(references, slots(len(references)), strict=True):
        changed = replace(job_of(candidate, workshop, ()), reference=reference, begins_with=begins_with, **job)
        trainees.append(Trainee(changed, batch_source(candidate, workshop, slot), slot, Told(), parent))
    train_together(workshop.model, trainees, workshop.cache, workshop.accelerator)
    for trainee in trainees:
        _ = trainee.result  # raises what went wrong
    policy = workshop.model.policy
    return [(lora.weights(policy, each.slot), each.on_step) for each in trainees]  # type: ignore[misc]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """To the last bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def deltas(tensors: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """s B A of each layer, in float64."""
    names = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    down, up = (lambda name: tensors[f"{name}.lora_A.weight"]), (lambda name: tensors[f"{name}.lora_B.weight"])
    return {name: scaling * up(name).double() @ down(name).double() for name in names}


def norm(values: dict[str, Tensor]) -> float:
    return float(sum(value.square().sum() for value in values.values())) ** 0.5

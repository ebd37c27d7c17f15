"""A trained reward model that scores: any form, any number of members, from its directory and the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign import lora, storage
from moalign.api import RewardModel
from moalign.data.tokenise import encode_record
from moalign.engine import judged
from moalign.engine import model as models
from moalign.engine.model import LanguageModel
from moalign.errors import ConfigError, RunError
from moalign.registry import Registry
from moalign.reward_models import archive, writing
from moalign.reward_models.config import RewardModelConfig
from moalign.sweeps.candidate import slots
from moalign.types import Record, Sample
from moalign.validation import nearest

Combine = Literal["mean", "worst", "uncertainty"]


@dataclass(frozen=True)
class TrainedRewardModel:
    """Scores by objective, larger is better. ``heads``: the tensors of each member, by the slot of its adapter."""

    objectives: tuple[str, ...]
    form: RewardModel
    model: LanguageModel
    heads: Mapping[str, Mapping[str, Tensor]]
    max_length: int

    def member_scores(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """[K,N,M]; NaN where a response is empty, or longer than the model was trained to read."""
        records = [Record(sample.prompt, (sample.response,)) for sample in samples]
        encoded = [encode_record(self.model.tokeniser, each, self.max_length).sequences[0] for each in records]
        fitting = [index for index, each in enumerate(encoded) if each is not None]
        found = np.full((len(self.heads), len(samples), len(self.objectives)), np.nan)
        if fitting:
            sequences = [each for each in encoded if each is not None]
            about = (sequences, list(range(len(sequences))))
            for place, (slot, head) in enumerate(self.heads.items()):
                found[place, fitting] = judged.scores(self.model, slot, self.form, self.objectives, head, *about)
        return found

    def scores(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """[N,M]: the mean over members."""
        return np.asarray(self.member_scores(samples).mean(0))

    def reward(
        self, objective: str, combine: Combine = "mean", lam: float = 0.1
    ) -> Callable[[Sequence[Sample]], list[float | None]]:
        """A function of samples for ``moalign.sweep(rewards={...})``; None where a sample cannot be scored.

        ``combine``: the members' mean, the worst of them, or mean - lam * variance. arXiv 2310.02743.
        """
        if objective not in self.objectives:
            raise ConfigError(f"no head is called '{objective}'{nearest(objective, self.objectives)}")
        column = self.objectives.index(objective)

        def score(samples: Sequence[Sample]) -> list[float | None]:
            members = self.member_scores(samples)[:, :, column]
            combined = members.min(0) if combine == "worst" else members.mean(0)
            if combine == "uncertainty":
                combined = combined - lam * members.var(0)
            return [None if np.isnan(value) else float(value) for value in combined]

        return score


def load(directory: Path, registry: Registry, base: str | None = None, device: str = "cpu") -> TrainedRewardModel:
    """Read a directory that was written by training. ``base``: where the base model is now, if not as then.

    Raises RunError where it is another base, CorruptFileError where a file is not what was written.
    """
    record = archive.read_record(directory)
    storage.verify(directory)
    config = RewardModelConfig.model_validate(record["config"])
    choice = config.reward_model
    form = registry.build("reward-model", choice.name, choice.options, "reward_model")
    model = models.load(base or config.model_directory, config.model, torch.device(device))
    if model.fingerprint != record["base"]:
        raise RunError(f"{directory}: this reward model was trained on another base model; name it with base")
    model = replace(model, packing=replace(model.packing, whole=True))
    names = sorted(record["members"], key=lambda name: int(name.rpartition("-")[2]))
    heads: dict[str, Mapping[str, Tensor]] = {}
    lora.add_slots(model.policy, slots(len(names)))
    for slot, name in zip(slots(len(names)), names, strict=True):
        folder = directory / name
        lora.read(model.policy, slot, folder / writing.ADAPTER, model.fingerprint)
        tensors = storage.read_tensors(folder / writing.HEAD)
        heads[slot] = {key: value.to(model.device) for key, value in tensors.items()}
    return TrainedRewardModel(config.objective_names, form, model, heads, config.data.max_length)

"""A trained reward model that scores: any form, any number of members, from its directory and the base model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from moalign import lora, storage
from moalign.api import Combine, Combining, RewardModel
from moalign.data.tokenise import Sequence as TokenSequence
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
from moalign.validation import explain, nearest

Scores = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class TrainedRewardModel:
    """Scores by objective, larger is better, also for an objective that was trained with ``direction: min``.

    ``heads``: the tensors of each member, by the slot of its adapter. ``max_length``: as trained, at most what the
    model takes.
    """

    objectives: tuple[str, ...]
    form: RewardModel
    model: LanguageModel
    heads: Mapping[str, Mapping[str, Tensor]]
    max_length: int

    def member_scores(self, samples: Sequence[Sample], rewards: Scores | None = None) -> NDArray[np.float64]:
        """[K,N,M]; NaN where a response is never trained on: blank, with a special token in it, or too long.

        Of a text longer than ``max_length`` the prompt loses its beginning, as in training. ``rewards``: for a form
        that reads other scores of the samples, those by objective, larger is better. Raises ConfigError without them.
        """
        known = self._known(samples, rewards)
        encoded = self._encoded(samples)
        fitting = [index for index, each in enumerate(encoded) if each is not None]
        found = np.full((len(self.heads), len(samples), len(self.objectives)), np.nan)
        if fitting:
            sequences = [each for each in encoded if each is not None]
            about = (sequences, list(range(len(sequences))), known[fitting])
            for place, (slot, head) in enumerate(self.heads.items()):
                found[place, fitting] = judged.scores(self.model, slot, self.form, self.objectives, head, *about)
        return found

    def scores(self, samples: Sequence[Sample], rewards: Scores | None = None) -> NDArray[np.float64]:
        """[N,M]: the mean over members; NaN and ``rewards`` as for ``member_scores``."""
        return np.asarray(self.member_scores(samples, rewards).mean(0))

    def token_rewards(self, samples: Sequence[Sample]) -> list[NDArray[np.float64] | None]:
        """Of each sample [K,T], one reward for each token of the response and the one that ends it; their sum over T
        is the score. None where ``member_scores`` has NaN. Raises ConfigError for forms without rewards of tokens.
        """
        if not hasattr(self.form, "token_rewards"):
            raise ConfigError(f"{type(self.form).__name__}: this form has no rewards of single tokens")
        encoded = self._encoded(samples)
        sequences = [each for each in encoded if each is not None]
        members = [
            judged.token_rewards(self.model, slot, self.form, self.objectives, head, sequences)
            for slot, head in self.heads.items()
        ]
        stacked = iter([np.stack(rows) for rows in zip(*members, strict=True)])
        return [None if each is None else next(stacked) for each in encoded]

    def _encoded(self, samples: Sequence[Sample]) -> list[TokenSequence | None]:
        records = [Record(sample.prompt, (sample.response,)) for sample in samples]
        return [encode_record(self.model.tokeniser, each, self.max_length).sequences[0] for each in records]

    def _known(self, samples: Sequence[Sample], rewards: Scores | None) -> NDArray[np.float64]:
        """[N,M], NaN where nothing is said."""
        found = np.full((len(samples), len(self.objectives)), np.nan)
        reads = getattr(self.form, "scores_from_rewards", False)
        if reads and rewards is None:
            raise ConfigError("rewards: this form reads other scores of the samples; give them by objective")
        if rewards and not reads:
            raise ConfigError("rewards: this form reads no other scores; leave them out")
        for name, values in (rewards or {}).items():
            if name not in self.objectives:
                raise ConfigError(f"rewards: no objective is called '{name}'{nearest(name, self.objectives)}")
            if len(values) != len(samples):
                raise ConfigError(f"rewards.{name}: {len(values)} scores for {len(samples)} samples")
            found[:, self.objectives.index(name)] = [np.nan if value is None else value for value in values]
        return found

    def reward(self, objective: str, combine: Combine = "mean", lam: float | None = None) -> Asked:
        """A function of samples for ``moalign.sweep(rewards={...})``; None where a sample cannot be scored.

        ``combine``: the members' mean, the worst of them, or mean - lam * variance (arXiv 2310.02743), which the sweep
        refuses where the objective has direction min: a head points up. Raises ConfigError.
        """
        if objective not in self.objectives:
            raise ConfigError(f"no head is called '{objective}'{nearest(objective, self.objectives)}")
        if getattr(self.form, "scores_from_rewards", False):
            raise ConfigError("this form reads other scores of a sample, which a sweep does not give; see `scores`")
        try:
            rule = Combining(combine=combine, lam=lam)
        except ValidationError as error:
            raise ConfigError(explain(error, Combining)) from None
        return Asked(self, self.objectives.index(objective), rule)


@dataclass(frozen=True)
class Asked:
    """One head of a reward model, as a function of samples."""

    model: TrainedRewardModel
    column: int
    rule: Combining

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        rows = self.model.member_scores(samples)[:, :, self.column].T.tolist()
        return [None if any(map(math.isnan, row)) else self.rule.combined(row) for row in rows]

    def pessimistic(self) -> bool:
        return self.rule.pessimistic()


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
    takes = getattr(model.policy.config.get_text_config(), "max_position_embeddings", None) or config.data.max_length
    return TrainedRewardModel(config.objective_names, form, model, heads, min(config.data.max_length, takes))

"""Where a step's pairs come from: a dataset on disk, or groups sampled from the policy. The loop sees no difference."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Protocol

import numpy as np

from moalign import lora
from moalign.config import RolloutSettings
from moalign.data.batching import group_pair_indices, pair_indices
from moalign.data.dataset import PairDataset
from moalign.engine.model import LanguageModel
from moalign.engine.rollouts import Rollout, Score, sample, sequence_of
from moalign.errors import TrainingError
from moalign.seeds import derive
from moalign.types import Sample


class BatchSource(Protocol):
    """``cacheable``: the same batches come again for other candidates, so frozen log-probabilities are kept."""

    @property
    def cacheable(self) -> bool: ...

    def at(self, step: int) -> tuple[PairDataset, np.ndarray]:
        """The dataset and the indices of this step's pairs; a function of (seed, step) and the policy."""
        ...


@dataclass(frozen=True)
class OfflineSource:
    """Pairs from files: content is a function of (seed, step) alone, equal for every candidate."""

    dataset: PairDataset
    seed: int
    pairs_per_step: int
    cacheable: bool = True

    def at(self, step: int) -> tuple[PairDataset, np.ndarray]:
        return self.dataset, pair_indices(self.dataset, self.seed, step, self.pairs_per_step)


@dataclass
class RolloutSource:
    """Pairs within groups of responses that the policy itself sampled, refreshed at even distances.

    ``slot`` holds the policy's adapter. Round 0 samples the base, which is the same for every candidate:
    ``first_round`` is shared between them.
    """

    model: LanguageModel
    slot: str
    objectives: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    score: Score
    settings: RolloutSettings
    steps: int
    seed: int
    first_round: dict[str, PairDataset]
    cacheable: bool = False
    _round: int = -1
    _dataset: PairDataset | None = field(default=None, repr=False)

    def at(self, step: int) -> tuple[PairDataset, np.ndarray]:
        current = step * self.settings.rounds // self.steps
        if current != self._round or self._dataset is None:
            self._dataset, self._round = self._draw(current), current
        first = -(-current * self.steps // self.settings.rounds)  # the round's first step
        pairs = group_pair_indices(
            self._dataset, derive(self.seed, "groups", current), step - first, self.settings.prompts_per_step
        )
        return self._dataset, pairs

    def _draw(self, number: int) -> PairDataset:
        if number == 0 and "dataset" in self.first_round:
            return self.first_round["dataset"]
        rng = np.random.default_rng(derive(self.seed, "prompts", number))
        count = min(self.settings.prompts, len(self.prompts))
        chosen = sorted(rng.choice(len(self.prompts), size=count, replace=False).tolist())
        with lora.active(self.model.policy, self.slot):
            rollouts = sample(
                self.model,
                [self.prompts[index] for index in chosen],
                samples=self.settings.samples,
                temperature=self.settings.temperature,
                max_new_tokens=self.settings.max_new_tokens,
                # one stream per round for all candidates: common random numbers make neighbours comparable
                seed=derive(self.seed, "rollouts", number),
            )
        rollouts = [Rollout(chosen[r.prompt], r.ids, r.text, r.ended) for r in rollouts]
        dataset = self._dataset_of(rollouts)
        if number == 0:
            self.first_round["dataset"] = dataset
        return dataset

    def _dataset_of(self, rollouts: list[Rollout]) -> PairDataset:
        """All pairs within the groups, between responses that every reward has scored."""
        rewards = self.score(rollouts)
        known = np.asarray(np.isfinite(rewards).all(axis=1))
        pairs = [
            (i, j)
            for i, j in combinations(range(len(rollouts)), 2)
            if rollouts[i].prompt == rollouts[j].prompt and known[i] and known[j] and rollouts[i].ids != rollouts[j].ids
        ]
        if not pairs:
            abstained = int((~known).sum())
            raise TrainingError(
                f"no two different responses to one prompt have all rewards: of {len(rollouts)} sampled, {abstained} "
                f"were left unscored and {len({r.ids for r in rollouts})} are different. A policy that repeats itself "
                "has collapsed; a smaller train.lr or more rollouts.rounds usually helps"
            )
        return PairDataset(
            objectives=self.objectives,
            sequences=tuple(sequence_of(rollout, self.prompts) for rollout in rollouts),
            samples=tuple(Sample("", rollout.text) for rollout in rollouts),
            pairs=np.array(pairs, dtype=np.int64),
            pair_objective=np.full(len(pairs), -1, dtype=np.int64),
            strength=np.ones(len(pairs)),
            rewards=rewards,
            groups=np.array([rollout.prompt for rollout in rollouts], dtype=np.int64),
            counts={"sampled responses without a reward": int((~known).sum())},
        )

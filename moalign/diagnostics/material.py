"""What policies of a run are asked: held-out pairs and prompts, and the rewards that score them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moalign.config import Config, ObjectiveSettings
from moalign.data.dataset import PairDataset, with_rewards
from moalign.data.loading import read_file
from moalign.data.pairing import labelled
from moalign.data.tokenise import Tokeniser
from moalign.diagnostics.question import Question
from moalign.engine.rewards import Scorer
from moalign.errors import DataError
from moalign.registry import Registry
from moalign.sweeps import callables, material
from moalign.sweeps.archive import Archive
from moalign.sweeps.material import Asked
from moalign.sweeps.plan import readers_for


@dataclass(frozen=True)
class Rewards:
    """``scorers`` by name: of the objectives in their order, then of what was given beside them; ``missing``: in words,
    whose reward cannot be had."""

    scorers: Mapping[str, Scorer]
    missing: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return list(self.scorers)


def rewards(config: Config, question: Question, registry: Registry, warn: Callable[[str], None]) -> Rewards:
    """The rewards that ``run.json`` names, but for those that the question gives. Raises as building plugins does."""
    settings: dict[str, ObjectiveSettings] = {}
    missing = []
    for name in config.objective_names:
        spec = config.objectives[name]
        if name in question.rewards:
            settings[name] = spec.model_copy(update={"reward": question.rewards[name]})
        elif callables.is_callable(config, name):
            missing.append(f"the reward of {name} was a Python callable, which is not in the run; give one by --reward")
        elif spec.reward is not None:
            settings[name] = spec
    for name, choice in question.rewards.items():
        settings.setdefault(name, ObjectiveSettings(reward=choice))
    scorers = {}
    for name, spec in settings.items():
        assert spec.reward is not None
        key = f"--reward {name}" if name in question.rewards else f"objectives.{name}.reward"
        reward = registry.build("reward", spec.reward.name, spec.reward.options, key, config.plugin_deadline)
        scorers[name] = Scorer(name, reward, spec, warn)
    return Rewards(scorers, tuple(missing))


@dataclass(frozen=True)
class Material:
    """``pairs``: labelled ones, None where there are none. ``asked``: prompts with their ids. ``source``: in words,
    where both are from. ``counts``: what was left out, by reason. ``missing``: in words, what is not there."""

    pairs: PairDataset | None
    asked: tuple[Asked, ...]
    source: str
    counts: Mapping[str, int]
    missing: tuple[str, ...]

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        return tuple(ids for _, ids in self.asked)

    def scored(self, scorer: Scorer) -> NDArray[np.float64]:
        """Rewards [N] of the responses in the pairs, NaN where unknown."""
        assert self.pairs is not None
        return scorer.score(self.pairs.samples).values

    def with_rewards(self, known: Mapping[str, NDArray[np.float64]]) -> Material:
        """The same pairs with these rewards [N] of their responses, by name, in place of the data's own."""
        if self.pairs is None:
            return self
        rewards = np.array(self.pairs.rewards)
        for index, name in enumerate(self.pairs.objectives):
            if name in known:
                rewards[:, index] = known[name]
        return replace(self, pairs=with_rewards(self.pairs, rewards))


def absent(archive: Archive, question: Question) -> str | None:
    """In words, the file of the run's data that is not there, where no other data is given; None: all is there."""
    if question.data is not None:
        if not question.data.exists():
            raise DataError("there is no such file", file=str(question.data))
        return None
    gone = [path for path in archive.config.data_paths if path is not None and not Path(path).exists()]
    if not gone:
        return None
    return f"the run's data, {gone[0]}, is not there, so no policy was run; give --data FILE, or go where it lies"


def gather(archive: Archive, question: Question, registry: Registry, tokeniser: Tokeniser) -> Material:
    """Read, split as the run does, tokenise; a file of its own is taken whole. Raises DataError with file and line."""
    config, counts, missing = archive.config, Counter[str](), []
    readers = readers_for(config.data.reader, registry, config.plugin_deadline)
    if question.data is None:
        _, held_out = material.records(config, readers, counts)
        source = "held out by the run"
    else:
        held_out = read_file(str(question.data), readers, config.objective_names, config.data.malformed).records
        source = str(question.data)
    pairs = None
    if any(record.pairs or record.scores for record in held_out):
        directions = {name: spec.direction for name, spec in config.objectives.items()}
        try:
            names, longest = config.objective_names, config.data.max_length
            pairs = labelled(held_out, tokeniser, names, max_length=longest, directions=directions)
            counts.update(pairs.counts)
        except DataError as error:
            missing.append(f"no labelled pair could be used: {str(error).splitlines()[0]}")
    else:
        missing.append(f"no labelled pairs ({source}): no ranking, no conflict of losses on pairs; give --data FILE")
    limit = material.longest_prompt(config, 0)
    asked = material.asked_prompts(tokeniser, material.distinct_prompts(held_out), limit, counts, False)
    left_out = {reason: number for reason, number in sorted(counts.items()) if number and reason != "records"}
    return Material(pairs, tuple(asked[: config.evaluate.prompts]), source, left_out, tuple(missing))

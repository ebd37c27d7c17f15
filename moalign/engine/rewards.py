"""Samples scored by reward plugins: each asked once, failures handled as the configuration says, and all of it counted.

What is kept is kept within the process: a resumed run asks again, and a reward that is deterministic says the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moalign import door
from moalign.api import Reward
from moalign.config import ObjectiveSettings
from moalign.errors import ConfigError, ModelError, PluginError
from moalign.types import Sample

Answer = float | PluginError | None  # a score, what went wrong with this sample, or None: the reward abstains


@dataclass(frozen=True)
class Scored:
    """Rewards ``values[N,M]`` of N samples for M objectives: larger is better, NaN where unknown.

    ``figures``: per objective, where not 0, the share of the samples that its reward failed on (NAME/failed) or
    abstained on (NAME/abstained), and NAME/skipped 1 where the whole objective was skipped. ``skipped``: indices of
    these objectives; all their values are NaN.
    """

    values: NDArray[np.float64]
    figures: Mapping[str, float] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()

    def with_constants(self, before: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """The values, in place of each skipped objective a constant: its mean of the round ``before`` [N',M], else 0.

        So no response counts more than another for it, and a rule that adapts sees it stand still.
        """
        values = self.values.copy()
        for index in self.skipped:
            values[:, index] = 0.0 if before is None else np.nanmean(before[:, index])
        return values


@dataclass(frozen=True)
class Column:
    """Scores of N samples for one objective, the direction applied, NaN where unknown; how many failed or abstained."""

    values: NDArray[np.float64]
    failed: int = 0
    abstained: int = 0
    skipped: bool = False


@dataclass
class Scorer:
    """The reward of one objective, with what it has said so far. ``warn`` is told of its first failure."""

    name: str
    reward: Reward
    settings: ObjectiveSettings
    warn: Callable[[str], None]
    _known: dict[bytes, float | None] = field(default_factory=dict, repr=False)
    _warned: bool = False

    def score(self, samples: Sequence[Sample], *, dispensable: bool = False) -> Column:
        """The samples' scores; those with the same content, and all that are known from before, are not asked again.

        ``dispensable``: the objective may go without scores this once, where ``on_error`` is skip_objective. Raises
        PluginError naming the plugin, where a failure is not to be skipped.
        """
        keys = [key_of(sample) for sample in samples]
        wanted = {key: sample for key, sample in zip(keys, samples, strict=True) if key not in self._known}
        try:
            new = dict(zip(wanted, self._ask(list(wanted.values())), strict=True))
            errors = [answer for answer in new.values() if isinstance(answer, PluginError)]
            if errors and self.settings.on_error != "skip_sample":
                raise errors[0]
        except PluginError as error:
            if self.settings.on_error != "skip_objective" or not dispensable or _for_good(error):
                raise
            self._note(error, "the objective")
            return Column(np.full(len(samples), np.nan), len(samples), skipped=True)
        if errors:
            self._note(errors[0], "the sample")
        if self.reward.deterministic:
            self._known |= {key: each for key, each in new.items() if not isinstance(each, PluginError)}
        found = [new[key] if key in new else self._known[key] for key in keys]
        values = np.array([each if isinstance(each, float) else np.nan for each in found], dtype=np.float64)
        failed = sum(isinstance(each, PluginError) for each in found)
        return Column(-values if self.settings.direction == "min" else values, failed, found.count(None))

    def _ask(self, samples: list[Sample]) -> list[Answer]:
        """An answer for each; where a call fails as a whole and samples may be skipped, each of them alone."""
        try:
            return self._answers(samples)
        except PluginError as error:
            if self.settings.on_error != "skip_sample" or _for_good(error):
                raise
            if len(samples) == 1:
                return [error]
        return [answer for sample in samples for answer in self._ask([sample])]

    def _answers(self, samples: list[Sample]) -> list[Answer]:
        if not samples:
            return []
        given = deepcopy(tuple(samples))  # what it does to them must not reach another's
        values = door.call(self.reward, "score", given, then=list)
        if len(values) != len(samples):
            raise PluginError(f"{self._who} it returned {len(values)} scores for {len(samples)} samples")
        return [self._answer(value) for value in values]

    def _answer(self, value: Any) -> Answer:
        if value is None:
            return None
        try:
            if isinstance(value, str) or getattr(value, "ndim", None):
                raise TypeError(f"{value!r} is neither")
            number = float(value)
        except Exception as error:  # also what a stranger's number raises, such as a tensor on the device "meta"
            return PluginError(f"{self._who} a score is a number, or None where it abstains: {error}")
        if not np.isfinite(number):
            return PluginError(f"{self._who} it returned {value!r}; a score is finite, or None where it abstains")
        return number

    @property
    def _who(self) -> str:
        return f"{door.origin(self.reward).who}, in score for {self.name}:"

    def _note(self, error: PluginError, what: str) -> None:
        if not self._warned:
            self.warn(f"objectives.{self.name}: {error}; {what} is skipped, as on_error says, and this is said once")
        self._warned = True


def score_all(scorers: Sequence[Scorer], samples: Sequence[Sample], *, dispensable: bool) -> Scored:
    """By every objective, in order; ``dispensable`` and errors as for ``Scorer.score``."""
    columns = [scorer.score(samples, dispensable=dispensable) for scorer in scorers]
    figures: dict[str, float] = {}
    for scorer, column in zip(scorers, columns, strict=True):
        number = max(1, len(samples))
        shares = {"failed": column.failed / number, "abstained": column.abstained / number}
        shares["skipped"] = float(column.skipped)
        figures |= {f"{scorer.name}/{what}": share for what, share in shares.items() if share}
    skipped = tuple(index for index, column in enumerate(columns) if column.skipped)
    return Scored(np.stack([column.values for column in columns], axis=1), figures, skipped)


def _for_good(error: PluginError) -> bool:
    """Whether the reward says that its options or its model are wrong, which no other sample mends."""
    return isinstance(error.__cause__, ConfigError | ModelError)


def key_of(sample: Sample) -> bytes:
    """sha256 of prompt and response; a conversation's messages count, the order of their keys does not."""
    return hashlib.sha256(json.dumps([sample.prompt, sample.response], sort_keys=True, default=dict).encode()).digest()

"""Rewards that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from moalign.api import DataError, Reward, Sample


class Words(Reward):
    """Right: what the others spoil."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [float(len(sample.response.split())) for sample in samples]


class Ranks(Words):
    """The rank within the batch."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        lengths = [len(sample.response) for sample in samples]
        return [float(sum(other < length for other in lengths)) for length in lengths]


class SortsItsInput(Words):
    """Sorts the samples in place."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        samples.sort(key=lambda sample: len(sample.response))  # type: ignore[attr-defined]
        return super().score(samples)


class ForgetsTheOrder(Words):
    """Scores in the order of length."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return super().score(sorted(samples, key=lambda sample: len(sample.response)))


class DividesByWords(Words):
    """Fails where there are no words."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [len(sample.response) / len(sample.response.split()) for sample in samples]


class NotANumber(Words):
    """Says NaN where it abstains."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [value or math.nan for value in super().score(samples)]


class LeavesOut(Words):
    """Leaves out what it cannot score."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [value for value in super().score(samples) if value]


class TextsOnly(Words):
    """Takes every prompt for text."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [float(len(sample.prompt.split())) for sample in samples]  # type: ignore[union-attr]


class NeedsASample(Words):
    """Fails without samples."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        assert max(len(sample.response) for sample in samples) >= 0
        return super().score(samples)


class Sampled(Words):
    """Draws a part of the words."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [float(len(sample.response) + random.SystemRandom().random()) for sample in samples]


class SeedsNumpy(Words):
    """Seeds numpy's global generator."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        np.random.seed(0)
        return super().score(samples)


class Pads(Words):
    """Counts in the padding of the batch, up to its longest response."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        width = max((len(sample.response) for sample in samples), default=0)
        return [len(sample.response) / (1 + width) for sample in samples]


class Rounds(Words):
    """Says that it is deterministic, and rounds with the size of the batch."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [value + 1e-7 * len(samples) for value in super().score(samples) if value is not None]


class RoundsALot(Rounds):
    """Says that it is not deterministic, and moves further than rounding does."""

    deterministic: ClassVar[bool] = False

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [value + 1e-2 * len(samples) for value in super().score(samples) if value is not None]


class Later(Words):
    """Answers with something for each score that nobody has awaited."""

    async def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:  # type: ignore[override]
        return [_Score(sample) for sample in samples]  # type: ignore[misc]


class _Score:
    """What stands for a score that nobody has awaited."""

    def __init__(self, sample: Sample):
        self.sample = sample


class Verdicts(Words):
    """Answers with True and False."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [len(sample.response) > 9 for sample in samples]


class AlwaysAbstains(Words):
    """Never has a score."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [None for _ in samples]


WRONG = {
    Ranks: "no ranking, centring or scaling",
    SortsItsInput: "samples were changed",
    ForgetsTheOrder: "keep the order",
    DividesByWords: "an empty response(.|\n)*ZeroDivisionError",
    NotANumber: "an empty response(.|\n)*nan",
    LeavesOut: "0 scores for 1 samples",
    TextsOnly: "a conversation(.|\n)*AttributeError",
    NeedsASample: "no samples at all",
    Sampled: "the same samples twice",
    SeedsNumpy: r"global random state of numpy\.random",
    Rounds: r"deterministic: ClassVar\[bool\] = False",
    RoundsALot: "no ranking, centring or scaling",
    Later: "plain finite numbers",
    Pads: "no ranking, centring or scaling",
    Verdicts: "plain finite numbers",
    AlwaysAbstains: "not a single score",
}


class Primes(Reward):
    """Unusual and right: knows texts about primes only, abstains on what says nothing, and answers with an array."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        for sample in samples:
            if not isinstance(sample.prompt, str) or "prime" not in sample.prompt:
                raise DataError("the reward primes knows questions about primes only")
        return np.array([1.5 if "7" in sample.response else None for sample in samples])  # type: ignore[return-value]


class Padded(Words):
    """Unusual and right: rounds with the size of the batch, and says so."""

    deterministic: ClassVar[bool] = False

    def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        return [len(sample.response) + 1e-7 * len(samples) for sample in samples]


class Awaited(Reward):
    """Unusual and right: a coroutine function."""

    async def score(self, samples: Sequence[Sample]) -> Sequence[float | None]:  # type: ignore[override]
        return list(await asyncio.gather(*[self._later(sample) for sample in samples]))

    async def _later(self, sample: Sample) -> float:
        await asyncio.sleep(0)
        return float(len(sample.response))


UNUSUAL = (Words, Primes, Padded, Awaited)

"""The world's rewards as a plugin, so that the demo is an ordinary sweep. Registered like everybody else's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from moalign.api import DataError, Register, Reward, Sample, hookimpl
from moalign.demo import grammar


class TinyAssistant(Reward):
    """Exact scores of the demo's world for one of its objectives; a text outside the grammar gets the worst."""

    objective: Literal["helpful", "harmless", "concise", "brilliant", "impeccable"]

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        if not isinstance(sample.prompt, str):
            raise DataError("the reward tiny-assistant knows the prompts of its own world, not conversations")
        return grammar.score(sample.prompt, sample.response)[self.objective]


@hookimpl
def register_rewards(register: Register) -> None:
    register("tiny-assistant", TinyAssistant, summary="exact scores of the demo's worlds, for one of their objectives")

"""A reward from a library that its author has installed and that pyproject.toml does not name."""

from __future__ import annotations

from collections.abc import Sequence

import moalign_missing_lexicon  # type: ignore[import-not-found]

from moalign.api import Register, Reward, Sample, hookimpl


class Politeness(Reward):
    """The share of polite words."""

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        return [moalign_missing_lexicon.share("polite", sample.response) for sample in samples]


@hookimpl
def register_rewards(register: Register) -> None:
    register("politeness", Politeness, summary="share of polite words")

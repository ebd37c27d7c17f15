"""The preference as a tag for each objective, in front of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from moalign.api import Conditioner, ConfigError, Preference

REGISTRATION = {
    "name": "tags",
    "class": "Tags",
    "summary": "a tag with a level for each objective in front of the prompt, as rewards in context have it",
    "paper": "arXiv:2402.10207",
}


class Tags(Conditioner):
    """A level from 0 to ``levels`` for each objective, the largest component at the top: "<harmless 3> <helpful 10> ".

    With ``of: rewards`` these are rewards in context (arXiv 2402.10207): a response is trained on behind tags of the
    rewards that it got, with the loss ``rejection-sampling`` and all responses kept, and the preference asks for the
    best reward of what it wants most, and for less of the others in proportion. With ``of: preference`` the tags say
    the preference, and the model learns what serves it by whichever loss. Negative components have negative levels.
    """

    by: ClassVar[Literal["text", "gates", "vectors"]] = "text"

    levels: int = Field(default=10, ge=1)
    """the level of the objective that counts most, or of its best reward"""
    of: Literal["preference", "rewards"] = "preference"
    """what the tags of a response say that is trained on: what it was asked for, or what it got"""
    ranges: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """of rewards: the worst and the best of an objective, which have level 0 and the highest; default 0 and 1. Larger
    is better: rewards of an objective with direction min are negated by then. What lies beyond has a level beyond"""

    @field_validator("ranges")
    @classmethod
    def _has_an_extent(cls, ranges: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for name, (worst, best) in ranges.items():
            if not worst < best:
                raise ValueError(
                    f"{name}: write [worst, best] with the worst below the best: larger is better, and with "
                    "direction min rewards are negated by then"
                )
        return ranges

    @model_validator(mode="after")
    def _ranges_are_of_rewards(self) -> Tags:
        if self.ranges and self.of != "rewards":
            raise ValueError("ranges are of rewards; add of: rewards, or leave them out")
        return self

    @property
    def tells_rewards(self) -> bool:
        return self.of == "rewards"

    def check(self, rank: int, objectives: tuple[str, ...]) -> None:
        unknown = sorted(set(self.ranges) - set(objectives))
        if unknown:
            raise ConfigError(f"condition.ranges: no objective is called '{unknown[0]}'")

    def text(self, preference: Preference) -> str:
        largest = max(abs(value) for value in preference.values.values())
        return self._tags({name: value / largest for name, value in preference.values.items()})

    def text_of_rewards(self, rewards: Mapping[str, float]) -> str:
        shares = {}
        for name, value in rewards.items():
            worst, best = self.ranges.get(name, (0.0, 1.0))
            shares[name] = (value - worst) / (best - worst)
        return self._tags(shares)

    def _tags(self, shares: Mapping[str, float]) -> str:
        """Of shares of the highest level."""
        return "".join(f"<{name} {round(self.levels * share)}> " for name, share in sorted(shares.items()))

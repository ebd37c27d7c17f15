"""Filters that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PrivateAttr

from moalign.api import ConfigError, Filter, Kept, Sampled


class Short(Filter):
    """Right: what the others spoil."""

    longest: int = 300

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        return Kept.where(about.lengths <= self.longest, "too long")


class Lottery(Filter):
    """Right: it draws, and gives weights and a figure."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        drawn = torch.rand(len(about.signal), generator=generator, dtype=torch.float64)
        weights = torch.where(drawn < 0.5, 0.0, drawn)
        reasons = tuple("" if weight else "not drawn" for weight in weights.tolist())
        return Kept(weights, reasons, {"mean": float(drawn.mean())})


class OfNamedOnes(Short):
    """Right: it works with an objective that the kit does not have."""

    objective: str = "humour"

    def check(self, objectives: Any) -> None:
        if self.objective not in objectives:
            raise ConfigError(f"no objective {self.objective}")

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        return Kept.where(about.rewards[:, about.objectives.index(self.objective)] > 0, "not funny")


class ChoosesNothing(Filter):
    """Has neither of the two methods."""


class ReturnsAMask(Short):
    """Forgets the reasons."""

    def keep_responses(self, about: Sampled, generator: Any) -> Any:
        return about.lengths <= self.longest


class Whole(Short):
    """Has whole numbers as weights."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        return Kept((about.lengths <= 0).long() + 1, ("",) * len(about.lengths))


class Negative(Short):
    """Counts responses against the policy."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        return Kept(about.signal - 10, ("",) * len(about.signal))


class DividesByTheSpread(Short):
    """Has no answer where all rewards are alike."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        size = about.signal.max() - about.signal.min()
        return Kept((about.signal - about.signal.min() + 1) / size, ("",) * len(about.signal))


class SaysNoReason(Short):
    """Leaves out responses without a word."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        return Kept((about.lengths <= 300).double(), ("",) * len(about.lengths))


class SaysALot(Short):
    """Has a reason of its own for each."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        every = about.lengths.tolist()
        return Kept(about.signal * 0, tuple(f"row {row} has {length}" for row, length in enumerate(every)))


class NamesAPath(Short):
    """Has a reason that cannot be the name of a figure."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        return Kept.where(about.lengths < 0, "length/too long")


class Clashes(Short):
    """Calls a figure as moalign calls one."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        return Kept(about.signal * 0 + 1, ("",) * len(about.signal), {"kept": 1.0})


class WritesIntoRewards(Short):
    """Changes what it was handed."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        about.rewards.zero_()
        return super().keep_responses(about, generator)


class DrawsElsewhere(Short):
    """Uses the global generator."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        return Kept.where(torch.rand(len(about.signal)) < 0.5, "not drawn")


class Remembers(Short):
    """Counts its calls."""

    _calls: list[int] = PrivateAttr(default_factory=list)

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        self._calls.append(1)
        return Kept.where(about.lengths <= 100 * (len(self._calls) % 4 + 1), "too long")


class TakesTheFirst(Short):
    """Looks at where a response stands."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        return Kept.where(torch.arange(len(about.signal)) < 3, "too late")


class ReadsNumbers(Short):
    """Takes groups by their numbers."""

    def keep_responses(self, about: Sampled, generator: Any) -> Kept:
        return Kept.where(about.groups < 4, "another group")


WRONG = {
    ChoosesNothing: "write keep_responses or keep_pairs",
    ReturnsAMask: "return a moalign.api.Kept",
    Whole: "return as weights a float64 for each response",
    Negative: "return finite weights, none below 0",
    DividesByTheSpread: "return finite weights",
    SaysNoReason: "give each that has the weight 0 a reason",
    SaysALot: "write a few reasons",
    NamesAPath: "write reasons as a few words",
    Clashes: "by names that are no reasons",
    WritesIntoRewards: "write into none that was handed over",
    DrawsElsewhere: "draw from a generator of your own",
    Remembers: "keep nothing in the plugin",
    TakesTheFirst: "treat the responses alike wherever they stand",
    ReadsNumbers: "use the groups' numbers only",
}
UNUSUAL = [Short, Lottery, OfNamedOnes]

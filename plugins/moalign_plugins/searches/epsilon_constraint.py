"""One objective is maximised, and bounds on the others sweep their range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, islice, product
from random import Random
from typing import ClassVar, Literal

from pydantic import Field

from moalign.api import Candidate, ConfigError, Outcome, Preference, Search, Space
from moalign_plugins.searches._one_model import refuse
from moalign_plugins.searches.grid import Grid

REGISTRATION = {
    "name": "epsilon-constraint",
    "class": "EpsilonConstraint",
    "summary": "one objective under bounds on the others, which sweep their range; reaches non-convex parts",
}


class EpsilonConstraint(Search):
    """Each objective alone; then one of them is maximised under thresholds for all others, on an even grid.

    The grid spans, for each bounded objective, the worst and the best score that the policies for one objective alone
    have (the payoff table of Haimes et al. 1971); the untouched model stands in for those that failed. The worst is
    itself a level, which asks for little, the best is not: who has it is known. Weights reach only the convex hull of
    the front, thresholds every part of it. Needs a combiner that keeps thresholds and takes weights as well:
    interior-point, or lagrangian. Thresholds are on mean rewards, so ``evaluate`` must measure these.

    ``points`` pays the largest grid that fits. Where not even two levels each do, of those the ones with fewest
    objectives above their worst are taken. With ``warm_start: neighbour`` the tightest bounds are first, and each
    candidate starts from the policy that by then is best among those that keep to its bounds, and takes fewer steps.
    """

    later_kinds: ClassVar[frozenset[str]] = frozenset({"thresholds"})

    maximise: str | None = None
    """the objective without a bound; none: the first in the alphabet"""
    points: int = Field(default=11, ge=1)
    """at most so many candidates, with those for one objective alone"""
    warm_start: Literal["neighbour"] | None = None
    """start from the adapter of a finished candidate that keeps to the bounds, where there is one"""
    warm_steps: float = Field(default=0.3, gt=0, le=1)
    """with warm_start: share of train.steps that those take which start so"""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        refuse(space, "epsilon-constraint", "trains a candidate for every bound")
        alone = self._alone(space)
        seen = {outcome.id for outcome in history}
        missing = [candidate for candidate in alone if candidate.id not in seen]
        if missing:
            return missing
        bounded = [candidate for candidate in self._bounded(space, history) if candidate.id not in seen]
        if self.warm_start is None:
            return bounded
        tightest_first = bounded[::-1][: max(1, space.together)]
        return [self._warm(candidate, space, history) for candidate in tightest_first]

    def _alone(self, space: Space) -> list[Candidate]:
        names = space.objectives
        if self.maximise is not None and self.maximise not in names:
            raise ConfigError(f"search.maximise: there is no objective '{self.maximise}'; known: {', '.join(names)}")
        if self.points < len(names):
            raise ConfigError(
                f"search.points: {self.points} cannot hold one candidate per objective; {len(names)} objectives need "
                f"at least {len(names)}"
            )
        return Grid(partitions=1).candidates(space)

    def _bounded(self, space: Space, history: Sequence[Outcome]) -> list[Candidate]:
        """One candidate for every point of the grid of bounds; none where nothing is known of the ranges."""
        maximised = self.maximise or space.objectives[0]
        ranges = {name: span for name, span in _payoffs(space, history).items() if name != maximised}
        found: dict[tuple[float, ...], Candidate] = {}
        for number, shares in enumerate(_grid(len(ranges), self.points - len(space.objectives)), start=1):
            pairs = zip(ranges.items(), shares, strict=True)
            levels = {name: low + share * (high - low) for (name, (low, high)), share in pairs}
            worst = all(level <= ranges[name][0] for name, level in levels.items())
            if not worst:  # else the policy for the maximised objective alone answers it
                candidate = Candidate(f"bounded-{number}", Preference("thresholds", levels))
                found.setdefault(tuple(levels.values()), candidate)
        return list(found.values())

    def _warm(self, candidate: Candidate, space: Space, history: Sequence[Outcome]) -> Candidate:
        maximised = self.maximise or space.objectives[0]
        keeping = [outcome for outcome in history if outcome.status == "done" and _keeps(outcome, candidate.preference)]
        if not keeping:
            return candidate
        start = max(keeping, key=lambda outcome: outcome.scores[maximised])
        steps = max(1, round(self.warm_steps * space.steps))
        return replace(candidate, parents=(start.id,), changes={"train.steps": steps})


def _payoffs(space: Space, history: Sequence[Outcome]) -> dict[str, tuple[float, float]]:
    """Worst and best score per objective of the policies for one objective alone; empty where none is done."""
    rows: dict[str, Mapping[str, float]] = {}
    for outcome in history:
        only = _only(outcome.preference)
        if outcome.status == "done" and only is not None:
            rows.setdefault(only, outcome.scores)
    if not rows:
        return {}
    found = [*rows.values(), *([space.base] if space.base and len(rows) < len(space.objectives) else [])]
    return {name: (min(row[name] for row in found), max(row[name] for row in found)) for name in space.objectives}


def _only(preference: Preference) -> str | None:
    """The objective that has all the weight, if one has."""
    full = [name for name, value in preference.values.items() if value == 1.0]
    return full[0] if preference.kind == "weights" and full else None


def _keeps(outcome: Outcome, thresholds: Preference) -> bool:
    able = outcome.kind != "conditioned"  # it has no adapter of its own
    return able and all(outcome.scores[name] >= level for name, level in thresholds.values.items())


def _grid(dimensions: int, points: int) -> Iterator[tuple[float, ...]]:
    """At most so many points of the even grid 0, 1/n, ..., (n-1)/n in so many dimensions, all 0 left out."""
    n = 1
    while dimensions and (n + 1) ** dimensions - 1 <= points:
        n += 1
    if n > 1:
        steps = islice(product(range(n), repeat=dimensions), 1, None)
        yield from (tuple(step / n for step in each) for each in steps)
    else:
        yield from islice(_halves(dimensions), max(points, 0))


def _halves(dimensions: int) -> Iterator[tuple[float, ...]]:
    """All of 0 and 1/2 but 0 alone, those with fewest halves first."""
    for count in range(1, dimensions + 1):
        for above in combinations(range(dimensions), count):
            yield tuple(0.5 * (index in above) for index in range(dimensions))

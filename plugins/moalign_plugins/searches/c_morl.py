"""Weights first, then constraints that extend the front from where it is thinnest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import ClassVar

from pydantic import Field

from moalign.api import Candidate, Outcome, Preference, Search, Space, non_dominated, values
from moalign_plugins.searches._crowding import loneliest
from moalign_plugins.searches._one_model import refuse
from moalign_plugins.searches.grid import Grid

REGISTRATION = {
    "name": "c-morl",
    "class": "CMORL",
    "summary": "a grid of weights, then extended by constraints from the points that stand most alone",
    "paper": "arXiv:2410.02236",
}


class CMORL(Search):
    """An even grid of weights; then, from the loneliest policies found, each objective alone without losing the others.

    Chosen are at most ``extended`` non-dominated outcomes by crowding distance. From each, once for each objective l,
    training goes on for l while every other j is to stay above level_j = score_j - slack * range_j, the range being
    that of the non-dominated scores (C-MORL, arXiv 2410.02236, whose 0.9 * score_j would ask more than there is of a
    negative score). With one objective there is nothing to extend. Needs a combiner that keeps thresholds and takes
    weights as well: interior-point, or lagrangian.

    What dominates, and what is lonely, follows from the scores less what their KL costs (``values``), so that a policy
    which only pays more KL does not count as better. The levels are scores as they are, since thresholds are on mean
    rewards; so ``evaluate`` must measure these.
    """

    later_kinds: ClassVar[frozenset[str]] = frozenset({"thresholds"})

    points: int = Field(default=6, ge=1)
    """at most so many points of the grid of weights"""
    extended: int = Field(default=5, ge=1)
    """at most so many policies are extended, each by a candidate for every objective"""
    first_share: float = Field(default=0.6, gt=0, lt=1)
    """of train.steps those that the grid's candidates take; an extension takes the others"""
    slack: float = Field(default=0.1, ge=0, lt=1)
    """how much of its range an objective may lose while another one is extended"""
    rounds: int = Field(default=1, ge=1)
    """how often the front is extended, from what it is by then; the steps are shared among the rounds"""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        refuse(space, "c-morl", "trains from one candidate to the next")
        seen = {outcome.id for outcome in history}
        missing = [candidate for candidate in self._first(space) if candidate.id not in seen]
        if missing or len(space.objectives) == 1:
            return missing
        used: list[tuple[float, ...]] = []
        for number in range(1, self.rounds + 1):
            known = _before(history, number)
            starts = [known[index] for index in self._starts(known, space, used)]
            used += [values(start, space) for start in starts]
            missing = [each for each in self._extensions(starts, known, space, number) if each.id not in seen]
            if missing:
                return missing
        return []

    def _first(self, space: Space) -> list[Candidate]:
        points = Grid(points=self.points).candidates(space)
        if len(space.objectives) == 1:
            return points
        return [replace(point, changes={"train.steps": self._first_steps(space)}) for point in points]

    def _first_steps(self, space: Space) -> int:
        return max(1, round(self.first_share * space.steps))

    def _starts(self, known: Sequence[Outcome], space: Space, used: Sequence[tuple[float, ...]]) -> list[int]:
        return loneliest([values(outcome, space) for outcome in known], self.extended, used)

    def _extensions(
        self, starts: Sequence[Outcome], known: Sequence[Outcome], space: Space, number: int
    ) -> list[Candidate]:
        steps = max(1, (space.steps - self._first_steps(space)) // self.rounds)
        ranges = _ranges(known, space)
        return [
            Candidate(
                f"extended-{number}-{place}-{name}",
                Preference("thresholds", self._levels(start, ranges, without=name)),
                parents=(start.id,),
                changes={"train.steps": steps},
            )
            for place, start in enumerate(starts)
            for name in space.objectives
        ]

    def _levels(self, start: Outcome, ranges: dict[str, float], *, without: str) -> dict[str, float]:
        return {name: start.scores[name] - self.slack * width for name, width in ranges.items() if name != without}


def _before(history: Sequence[Outcome], number: int) -> list[Outcome]:
    """What was done before anything of this round ended: what the round was chosen from, and no more."""
    first = next((at for at, each in enumerate(history) if each.id.startswith(f"extended-{number}-")), len(history))
    return [outcome for outcome in history[:first] if outcome.status == "done" and outcome.kind != "conditioned"]


def _ranges(known: Sequence[Outcome], space: Space) -> dict[str, float]:
    """Largest less smallest score per objective of what is not dominated; where that is 0, of all and the base."""
    if not known:
        return {}
    front = non_dominated([values(outcome, space) for outcome in known]).tolist()
    best = [outcome.scores for outcome, free in zip(known, front, strict=True) if free]
    all_scores = [*(outcome.scores for outcome in known), *([space.base] if space.base else [])]
    return {name: _width(best, name) or _width(all_scores, name) for name in space.objectives}


def _width(scores: Sequence[Mapping[str, float]], name: str) -> float:
    found = [each[name] for each in scores]
    return max(found) - min(found)

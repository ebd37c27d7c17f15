"""The search that suits the number of objectives and the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from pydantic import Field

from moalign.api import Candidate, Outcome, Search, Space
from moalign_plugins.searches.grid import Grid
from moalign_plugins.searches.optimistic_linear_support import OptimisticLinearSupport
from moalign_plugins.searches.soup import Soup

REGISTRATION = {
    "name": "auto",
    "class": "Auto",
    "summary": "the search that suits the number of objectives and the budget; what a silent configuration gets",
}

_ENOUGH = 1.4  # trainings for each objective, from which on warm starts close the gaps better than mixes


class Auto(Search):
    """One of the other searches, by what was measured on worlds with a known front (docs/searches.md).

    One model that is asked for preferences answers an even grid. Where the budget pays little more than each objective
    alone, mixes fill in between. Where candidates are not trained for weighted sums, it is an even grid. Else
    optimistic linear support, whose candidates after the first take few steps.
    """

    points: int | None = Field(default=None, ge=1)
    """at most so many trained, beside mixes; none: 11 for two objectives, 15 for three, five for each of more"""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        return list(self.chosen(space).propose(space, history, rng))

    def reason(self, space: Space) -> str:
        objectives = len(space.objectives)
        if objectives == 1:
            return "one objective: one candidate"
        if space.conditioned:
            return "one model, asked for an even grid of preferences"
        if space.budget is not None and space.budget < objectives:
            return f"the budget pays {_paid(space)}, and there are {objectives} objectives: no whole front"
        if _tight(space):
            soup = f"soup, each of the {objectives} objectives alone and mixes between them"
            return f"the budget pays {_paid(space)}: {soup}"
        if not space.weighted_sums:
            return "candidates are not trained for weighted sums of the rewards: an even grid of preferences"
        paid = "" if space.budget is None else f" and a budget of {_paid(space)}"
        return f"{objectives} objectives{paid}: optimistic-linear-support, {self.chosen(space).reason(space)}"

    def chosen(self, space: Space) -> Search:
        """The search for this space, with its options."""
        objectives = len(space.objectives)
        points = max(objectives, self.points or _points(objectives))
        if objectives == 1 or space.conditioned:
            return Grid(points=points)
        if _tight(space):
            return Soup(trained=objectives, points=points)
        if not space.weighted_sums:
            return Grid(points=points if space.budget is None else max(objectives, min(points, int(space.budget))))
        return OptimisticLinearSupport(points=points, mixes=2 * points if objectives == 3 else points)


def _points(objectives: int) -> int:
    """11 for two objectives, then those of even grids with four steps."""
    return {1: 1, 2: 11, 3: 15}.get(objectives, 5 * objectives)


def _paid(space: Space) -> str:
    """Never more than it pays: 1.97 are not 2.0."""
    return f"{math.floor((space.budget or 0.0) * 10) / 10:.1f} trainings"


def _tight(space: Space) -> bool:
    return space.budget is not None and space.budget < _ENOUGH * len(space.objectives)

"""A few trained candidates, and mixes of their adapters between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from pydantic import Field, model_validator

from moalign.api import Candidate, Outcome, Search, Space
from moalign_plugins.searches._warm_start import enclosed
from moalign_plugins.searches.grid import Grid, coarse

REGISTRATION = {
    "name": "soup",
    "class": "Soup",
    "summary": "a few trained candidates, and mixes of their adapters between them",
    "paper": "arXiv:2306.04488",
}


class Soup(Search):
    """An even grid of which only a coarser grid is trained (rewarded soups, arXiv:2306.04488).

    The points between are mixes of the nearest trained adapters, summed in delta space: sum_k c_k s_k B_k A_k with the
    barycentric coordinates c of the wanted weights. They are evaluated like all others, and cost no training. With
    ``trained`` no larger than the number of objectives each objective alone is trained, and c is the weights
    themselves: the paper's soups over the simplex. An even grid has points between from 3, 6, 10, 15 ``points`` on for
    2, 3, 4, 5 objectives. Where a training failed, or the budget did not pay it, there are mixes between the others.
    """

    trained: int = Field(default=3, ge=1)
    """at most so many candidates are trained, but one for each objective is"""
    points: int = Field(default=11, ge=1)
    """at most so many points in all, of an even grid; those that are trained are the nearest to a coarser one"""

    @model_validator(mode="after")
    def _more_points_than_trained(self) -> Soup:
        if self.points < self.trained:
            raise ValueError(f"points ({self.points}) must be at least trained ({self.trained})")
        return self

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        seen = {outcome.id for outcome in history}
        points = Grid(points=self.points).candidates(space)
        trained = coarse(points, self.trained, space)
        if missing := [candidate for candidate in trained if candidate.id not in seen]:
            return missing
        between = [replace(point, id=f"mix-{point.id}", mixed=True) for point in points if point not in trained]
        return [each for each in between if each.id not in seen and enclosed(each, history, space)]

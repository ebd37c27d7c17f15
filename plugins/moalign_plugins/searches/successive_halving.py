"""Few steps for many weights, many steps for the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from random import Random

from pydantic import Field

from moalign.api import Candidate, ConfigError, Outcome, Search, Space, hypervolume, values
from moalign_plugins.searches._one_model import refuse
from moalign_plugins.searches.grid import Grid

REGISTRATION = {
    "name": "successive-halving",
    "class": "SuccessiveHalving",
    "summary": "few steps for many weights, then more for the best of them, by hypervolume",
    "paper": "arXiv:1502.07943",
}

_DECIMALS = 10  # of a hypervolume in units of the objectives' ranges; what differs less is equal
_BELOW = 0.01  # of an objective's range: so far below the worst value


class SuccessiveHalving(Search):
    """An even grid of weights of which only the best get all the steps (arXiv:1502.07943, one bracket of 1603.06560).

    The first rung trains all of them for train.steps / eta^(rungs - 1) steps. Each next rung goes on with the best
    1 / eta, from their adapters, until they have eta times as many steps; the last ones end with exactly train.steps.
    The optimiser and the learning rate's schedule begin anew on each rung, and the data is drawn by another seed, so
    that a rung does not see the pairs of the one before once more.

    The best are those that add most to the hypervolume of the ones chosen before them, first the best of each
    objective. It is measured from the run's reference point, and among those that add nothing to it from just below
    the worst values of the rung; neither moves within a rung. What failed or did not fit into the budget drops out.
    """

    points: int = Field(default=11, ge=1)
    """at most so many weights on the first rung, of an even grid"""
    eta: float = Field(default=3.0, ge=1.5)
    """so many times fewer candidates on each rung, and as many times more steps"""
    rungs: int = Field(default=3, ge=1, le=9)
    """how often it is chosen, and once more"""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        refuse(space, "successive-halving", "trains some candidates longer than others")
        known = {outcome.id: outcome for outcome in history}
        steps = self.steps(space)
        rung = [
            Candidate(f"rung0-{point.id}", point.preference, changes={"train.steps": steps[0]})
            for point in Grid(points=self.points).candidates(space)
        ]
        for number in range(1, self.rungs):
            if any(candidate.id not in known for candidate in rung):
                break
            more = {"train.steps": steps[number], "seed": (space.seed + number) % 2**32}
            rung = [
                Candidate(_next(outcome.id, number), outcome.preference, (outcome.id,), changes=more)
                for outcome in self._best(rung, known, space)
            ]
        return [candidate for candidate in rung if candidate.id not in known]

    def steps(self, space: Space) -> list[int]:
        """Of each rung beyond the one before; they add up to ``space.steps``."""
        until = [round(space.steps / self.eta ** (self.rungs - 1 - number)) for number in range(self.rungs)]
        each = [after - before for before, after in pairwise([0, *until])]
        if min(each) < 1:
            raise ConfigError(
                f"search.rungs: {self.rungs} rungs with eta {self.eta:g} leave one of them no step of train.steps "
                f"{space.steps}; use fewer rungs, or more steps"
            )
        return each

    def _best(self, rung: Sequence[Candidate], known: Mapping[str, Outcome], space: Space) -> list[Outcome]:
        """Those of a finished rung that go on, in its order; a share of all of it, failed ones included."""
        done = [known[candidate.id] for candidate in rung if known[candidate.id].status == "done"]
        wanted = -int(-len(rung) // self.eta)
        chosen = best([values(outcome, space) for outcome in done], wanted, _reference(space))
        return [done[place] for place in sorted(chosen)]


def best(points: Sequence[tuple[float, ...]], wanted: int, reference: tuple[float, ...] | None) -> list[int]:
    """Places of so many of the points [n,M], the most valuable first; more than that, if as many are extremes.

    The extremes, then in turn what adds most to the hypervolume of those chosen; the first of equals. Where none of the
    rest adds anything, all that is left are dominated, and it goes on among them as if nothing had been chosen.
    """
    if not points:
        return []
    columns = list(zip(*points, strict=True))
    lowest, ranges = [min(column) for column in columns], [max(column) - min(column) or 1.0 for column in columns]
    corners = [tuple(-_BELOW for _ in columns)]  # in units of the ranges, from the worst values
    if reference is not None:
        corners.insert(0, _scaled(reference, lowest, ranges))
    points = [_scaled(point, lowest, ranges) for point in points]
    columns = list(zip(*points, strict=True))
    chosen: list[int] = []
    for column in columns:
        extreme = max(range(len(points)), key=lambda one: (column[one], sum(points[one]), -one))
        chosen += [extreme] if extreme not in chosen else []
    layer, rest = list(chosen), [place for place in range(len(points)) if place not in chosen]
    while rest and len(chosen) < wanted:
        gains = {place: _gain(points, layer, place, corners) for place in rest}
        top = max(rest, key=lambda place: (gains[place], -place))
        if not any(gains[top]) and layer:
            layer = []
            continue
        chosen.append(top)
        layer.append(top)
        rest.remove(top)
    return chosen


def _scaled(point: Sequence[float], lowest: Sequence[float], ranges: Sequence[float]) -> tuple[float, ...]:
    return tuple((value - low) / extent for value, low, extent in zip(point, lowest, ranges, strict=True))


def _gain(
    points: Sequence[tuple[float, ...]], layer: Sequence[int], place: int, corners: Sequence[tuple[float, ...]]
) -> tuple[float, ...]:
    """What a point adds to the hypervolume of a layer, from each of the corners."""
    before = [points[each] for each in layer]
    return tuple(
        round(
            hypervolume([*before, points[place]], corner) - (hypervolume(before, corner) if before else 0.0), _DECIMALS
        )
        for corner in corners
    )


def _reference(space: Space) -> tuple[float, ...] | None:
    """The run's; None before it is known."""
    for point in (space.reference_point, space.base):
        if point:
            return tuple(point[name] for name in space.objectives)
    return None


def _next(identity: str, number: int) -> str:
    return f"rung{number}-{identity.partition('-')[2]}"

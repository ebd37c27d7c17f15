"""Bayesian optimisation over the weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from math import dist
from random import Random
from typing import ClassVar, Literal

from moalign.api import Candidate, ConfigError, Outcome, Preference, Search, Space
from pydantic import Field

from moalign_botorch.acquisition import promising
from moalign_botorch.simplex import Weights, corners, draw, filling, is_near
from moalign_botorch.surrogate import Measured, fit, measured
from moalign_botorch.threads import one_thread

_ID = re.compile(r"bayesian-(\d+)-(\d+)of(\d+)")
_BELOW_THE_WORST = 0.1  # of the range of values, where no reference point is known


class Bayesian(Search):
    """The weights with the largest expected gain in hypervolume, again and again: arXiv:2105.08195, 2310.20708.

    First each objective alone and some weights between. Then a Gaussian process per objective learns value by weights,
    with the scores' standard errors as its noise, and the next weights are those that promise most; a batch is chosen
    one by one, each as if those before were measured. An id says round, place in it and its size, so that a round that
    was interrupted is proposed again as it was.
    """

    requires: ClassVar[dict[str, str]] = {"botorch": "moalign-botorch"}

    points: int = Field(default=11, ge=1)
    """at most so many candidates"""
    initial: int = Field(default=2, ge=0)
    """weights that fill the space, proposed together with each objective alone before anything is modelled"""
    batch: int | None = Field(default=None, ge=1)
    """candidates of one proposal; none: as many as one pass over the base holds"""
    warm_start: Literal["neighbour"] | None = None
    """start from the adapter of the nearest finished candidate, once the first proposal has ended"""
    warm_steps: float = Field(default=0.15, gt=0, le=1)
    """with warm_start: share of train.steps that such candidates take"""
    samples: int = Field(default=64, ge=1)
    """of the fronts that may be, for the expectation; a power of 2 is best"""
    raw: int = Field(default=128, ge=1)
    """weights drawn, of which the best are where climbs begin"""
    restarts: int = Field(default=4, ge=1)
    """climbs for each candidate"""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        if self.points < len(space.objectives):
            raise ConfigError(
                f"search.points: {self.points} cannot hold one candidate per objective; {len(space.objectives)} "
                f"objectives need at least {len(space.objectives)}"
            )
        seed = rng.getrandbits(62)
        places = [match and tuple(map(int, match.groups())) for match in (_ID.fullmatch(each.id) for each in history)]
        own = [place for place in places if place]
        last, size = max(((number, size) for number, _, size in own), default=(-1, 0))
        ids = {outcome.id for outcome in history}
        if any(_id(last, place, size) not in ids for place in range(size)):
            first = next(index for index, place in enumerate(places) if place and place[0] == last)
            again = self._round(last, min(size, self.points), space, history[:first], seed)
            if missing := [candidate for candidate in again if candidate.id not in ids]:
                return missing
        left = self.points - len(own)
        if last < 0 and (begin := self._round(0, left, space, history, seed)):
            return begin
        unpaid = space.affordable is not None and space.affordable < self._share and not space.conditioned
        if left <= 0 or unpaid:
            return []
        return self._round(max(last, 0) + 1, min(left, self.batch or max(1, space.together)), space, history, seed)

    @property
    def _share(self) -> float:
        """Of the configuration's steps, those of a candidate after the first proposal."""
        return 1.0 if self.warm_start is None else self.warm_steps

    def _round(self, number: int, size: int, space: Space, history: Sequence[Outcome], seed: int) -> list[Candidate]:
        """At most ``size`` candidates of the round with this number, when the history was this."""
        rng = Random(seed + number)
        known = [each.preference.vector(space.objectives) for each in history if each.preference.kind == "weights"]
        data, objectives = measured(space, history), len(space.objectives)
        if number == 0:
            chosen = [corner for corner in corners(objectives) if not is_near(corner, known)][:size]
            more = min(self.initial, size - len(chosen))
            chosen += filling(more, objectives, known + chosen, rng)
        elif objectives == 1 or len(data.weights) < objectives + 1:
            chosen = filling(size, objectives, known, rng)
        else:
            chosen = self._best(size, data, space, known, rng)
        made = []
        for place, weights in enumerate(chosen):
            preference = Preference("weights", dict(zip(space.objectives, weights, strict=True)))
            made.append(Candidate(_id(number, place, len(chosen)), preference))
        return self._warm(made, space, history) if number and self.warm_start else made

    def _best(self, size: int, data: Measured, space: Space, known: Sequence[Weights], rng: Random) -> list[Weights]:
        """torch's own generator and threads are left as they were."""
        import torch

        objectives, chosen = len(space.objectives), list[Weights]()
        reference = reference_point(data, space)
        with torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(rng.getrandbits(62))
            model = fit(data)
            while len(chosen) < size:
                pool, seed = draw(self.raw, objectives, rng), rng.getrandbits(31)
                at = [*known, *chosen]
                best = promising(model, data.weights, reference, at, pool, self.samples, self.restarts, seed)
                if best is None:
                    break
                chosen.append(best)
        return chosen

    def _warm(self, made: Sequence[Candidate], space: Space, history: Sequence[Outcome]) -> list[Candidate]:
        """From the nearest that was trained, of equally near ones the first."""
        trained = [
            (each.preference.vector(space.objectives), each.id)
            for each in history
            if each.status == "done" and each.kind == "trained" and each.preference.kind == "weights"
        ]
        if not trained:
            return list(made)
        changes = {"train.steps": max(1, round(self.warm_steps * space.steps))}
        warm = []
        for candidate in made:
            weights = candidate.preference.vector(space.objectives)
            _, parent = min((round(dist(at, weights), 9), id) for at, id in trained)
            warm.append(replace(candidate, parents=(parent,), changes=changes))
        return warm


def reference_point(data: Measured, space: Space) -> tuple[float, ...]:
    """The space's; where it has none, a little below the worst value of each objective."""
    if all(name in space.reference_point for name in space.objectives):
        return tuple(space.reference_point[name] for name in space.objectives)
    columns = list(zip(*data.values, strict=True))
    return tuple(min(column) - _BELOW_THE_WORST * (max(column) - min(column)) for column in columns)


def _id(number: int, place: int, size: int) -> str:
    return f"bayesian-{number}-{place + 1}of{size}"

"""Trained candidates, and averages of them with the base, by a share for each block of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Literal

from pydantic import Field, field_validator

from moalign.api import Candidate, Outcome, Search, Space, non_dominated, values
from moalign_plugins.searches._one_model import refuse
from moalign_plugins.searches.grid import Grid

REGISTRATION = {
    "name": "layer-averaging",
    "class": "LayerAveraging",
    "summary": "trained candidates, and averages of them with the base by blocks of layers, against the alignment tax",
    "paper": "arXiv:2309.06256",
}

Shares = tuple[float, ...]  # of the trained candidate, by blocks from the bottom; the rest is the base's

_SAME = 9  # digits in which numbers are told apart


class LayerAveraging(Search):
    """Adaptive model averaging (AMA, arXiv:2309.06256) as a search: what was aligned is averaged with the base again.

    The paper's: block k of the model becomes a_k base + (1 - a_k) aligned, K blocks from the bottom (3), with the mean
    of the a_k held at a_0 (0.2, 0.4); equal a_k are plain averaging. Averaging gives back what alignment cost, the
    alignment tax, where less is lost of what it won.

    Ours: how the a_k are found. The paper trains them by gradient, on the best of n responses, for one reward and a
    tax known from benchmarks; here they are searched for among values that are measured, the KL paid for, and each
    candidate costs an evaluation. A grid is trained. Then for each trained candidate that is on their front, and each
    a_0, the homogeneous average is tried, and K in which one block keeps more than the others. ``refine`` times the
    best average of each candidate is varied: each block up and down, the others the other way. The mean of a_k stays
    a_0, and 0 <= a_k <= 1, which the paper's may exceed. It averages all layers that are adapted; what is not adapted
    is the base's already. The blocks have equal numbers of layers where these can be divided by K.

    The best average has the largest sum of preference times value, less its tax: how far it is below the base, added
    over the objectives. Both in units of the objective's range among the trained.
    """

    trained: int = Field(default=3, ge=1)
    """at most so many candidates are trained, of an even grid, but one for each objective is"""
    blocks: int = Field(default=3, ge=1, le=200)
    """K; no more than the model has layers, or some are without any"""
    base_shares: tuple[float, ...] = (0.2, 0.4)
    """a_0: mean share of the base, from 0 to below 1; 0 is the trained candidate itself and adds nothing"""
    averaged: Literal["front", "extremes"] = "front"
    """which trained candidates: those that no other dominates, or the best in each objective"""
    spread: float = Field(default=0.5, gt=0, le=1)
    """how much more one block keeps, of what is possible at this mean"""
    refine: int = Field(default=1, ge=0, le=20)
    """rounds around the best, each with half the step of the one before"""

    @field_validator("base_shares")
    @classmethod
    def _distinct_shares(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        if not given or len(given) > 20 or not all(0 <= share < 1 for share in given):
            raise ValueError("give 1 to 20 numbers, each from 0 to below 1; 1 is the base itself")
        if len({f"{share:.4f}" for share in given}) < len(given):
            raise ValueError("give each share once; they are told apart by four digits")
        return given

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        refuse(space, "layer-averaging", "averages candidates with the base, layer by layer")
        outcomes = {outcome.id: outcome for outcome in history}
        trained = Grid(points=max(self.trained, len(space.objectives))).candidates(space)
        if missing := [candidate for candidate in trained if candidate.id not in outcomes]:
            return missing
        done = [candidate for candidate in trained if outcomes[candidate.id].status == "done"]
        points = [values(outcomes[candidate.id], space) for candidate in done]
        chosen = [candidate for candidate, taken in zip(done, self._chosen(points), strict=True) if taken]
        tried = {candidate.id: self._first(trained.index(candidate)) for candidate in chosen}
        for round_ in range(self.refine + 1):
            candidates = [
                Candidate(name, source.preference, mixed=True, shares={source.id: shares})
                for source in chosen
                for name, shares in tried[source.id].items()
            ]
            if missing := [candidate for candidate in candidates if candidate.id not in outcomes]:
                return missing
            if round_ < self.refine:
                for source in chosen:
                    worth = self._worth(source, tried[source.id], points, space, outcomes)
                    tried[source.id] |= self._around(worth, tried[source.id], trained.index(source), round_ + 1)
        return []

    def _chosen(self, points: Sequence[Sequence[float]]) -> list[bool]:
        """Which of the trained candidates are averaged with the base."""
        if not points:
            return []
        if self.averaged == "front":
            return non_dominated(points).tolist()
        best = [max(range(len(points)), key=lambda k: points[k][objective]) for objective in range(len(points[0]))]
        return [k in best for k in range(len(points))]

    def _first(self, number: int) -> dict[str, Shares]:
        """Id -> shares: the homogeneous averages, and with one block that keeps more, for each mean."""
        found: dict[str, Shares] = {}
        for base in self.base_shares:
            name = f"average-{number}-base{base:.4f}"
            even = (1.0 - base,) * self.blocks
            _add(found, f"{name}-even", even)
            for block in range(self.blocks if self.blocks > 1 else 0):
                _add(found, f"{name}-block{block}", _moved(even, block, self._step(base)))
        return found

    def _step(self, base: float) -> float:
        """What a block gets more at this mean: ``spread`` of what leaves all shares within 0 and 1."""
        return self.spread * min(base, (self.blocks - 1) * (1.0 - base))

    def _worth(
        self,
        source: Candidate,
        tried: Mapping[str, Shares],
        points: Sequence[Sequence[float]],
        space: Space,
        outcomes: Mapping[str, Outcome],
    ) -> dict[str, float]:
        """Id -> what an average is worth, of those that are done."""
        ranges = [max(column) - min(column) or 1.0 for column in zip(*points, strict=True)]
        weights = source.preference.vector(space.objectives)
        base = [space.base.get(name, -float("inf")) for name in space.objectives]  # before it is known: no tax
        found = {}
        for name in tried:
            if outcomes[name].status == "done":
                reached = values(outcomes[name], space)
                terms = zip(weights, reached, base, ranges, strict=True)
                found[name] = sum((w * value - max(0.0, before - value)) / unit for w, value, before, unit in terms)
        return found

    def _around(
        self, worth: Mapping[str, float], tried: Mapping[str, Shares], number: int, round_: int
    ) -> dict[str, Shares]:
        """Id -> shares that are new: the best with each block up and down, each as far as this round goes."""
        found: dict[str, Shares] = {}
        if not worth or self.blocks == 1:
            return found
        best = tried[max(worth, key=lambda name: round(worth[name], _SAME))]
        step = self._step(1.0 - sum(best) / self.blocks) / 2**round_
        for block in range(self.blocks):
            for way, sign in (("more", 1.0), ("less", -1.0)):
                length = min(step, _room(best, block, sign))
                name = f"average-{number}-round{round_}-block{block}-{way}"
                _add(found, name, _moved(best, block, sign * length), tried)
        return found


def _moved(shares: Shares, block: int, by: float) -> Shares:
    """One block's share up ``by`` so much, and the others' down, all by the same: the mean stays."""
    rest = by / (len(shares) - 1)
    return tuple(round(share + by if k == block else share - rest, 12) for k, share in enumerate(shares))


def _room(shares: Shares, block: int, sign: float) -> float:
    """How far ``_moved`` can go in this direction within 0 and 1."""
    others = [share for k, share in enumerate(shares) if k != block]
    if sign > 0:
        return min(1.0 - shares[block], min(others) * len(others))
    return min(shares[block], (1.0 - max(others)) * len(others))


def _add(found: dict[str, Shares], name: str, shares: Shares, known: Mapping[str, Shares] | None = None) -> None:
    """Unless it was there already, or is the trained candidate itself."""
    there = [*found.values(), *(known or {}).values(), (1.0,) * len(shares)]
    if not any(all(round(a - b, _SAME) == 0 for a, b in zip(shares, each, strict=True)) for each in there):
        found[name] = shares

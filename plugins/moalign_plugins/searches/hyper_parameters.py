"""Hyper-parameters chosen by the hypervolume of the front that they lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moalign.api import Candidate, ConfigError, Outcome, Search, Space, hypervolumes, values
from moalign_plugins.searches._one_model import refuse
from moalign_plugins.searches.grid import Grid
from moalign_plugins.searches.sobol import cube

REGISTRATION = {
    "name": "hyper-parameters",
    "class": "HyperParameters",
    "summary": "beta, learning rate, rank by the hypervolume of a small front, confirmed on other seeds",
    "paper": "arXiv:2310.16487",
}

_WHOLE = ("model.lora.r", "train.steps", "train.pairs_per_step")
_DIGITS = 4  # significant ones of a number that is tried
_LARGEST_SEED = 2**32
_LONGEST = 128  # characters of an id

Changes = Mapping[str, Any]


class Range(BaseModel):
    """Numbers from low to high; with ``log`` evenly on a logarithmic scale."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"low ({self.low:g}) must be above 0 on a logarithmic scale")
        return self

    def at(self, share: float) -> float:
        """The number at a share in [0,1] of the range."""
        found = self.low * (self.high / self.low) ** share if self.log else self.low + share * (self.high - self.low)
        return min(max(float(f"{found:.{_DIGITS}g}"), self.low), self.high)


class HyperParameters(Search):
    """What a configuration of hyper-parameters is worth: the hypervolume of the front it leads to (arXiv:2310.16487).

    ``configurations`` of a scrambled Sobol sequence over ``space`` each train a small grid of weights, with each of the
    tuning seeds; then ``refine`` more close to the best one. The score is the mean over the seeds of the hypervolume,
    from the run's reference point, of the values reached. The best ``confirm`` are trained again with held-out seeds,
    which chose nothing, and beside them what the configuration file says, as the baseline: the best of many scores is
    too good by chance, and only those later ones can be believed.

    A point that failed, or did not fit into the budget, is not there: its seed's front has one point less, and no point
    at all is a hypervolume of 0. Configurations that round to the same are tried once.
    """

    space: dict[str, Range | list[Any]] = Field(min_length=1)
    """loss.beta, train.lr, model.lora.r (at most the configured) -> {low, high, log: true}, or a list of values"""
    configurations: int = Field(default=8, ge=1, le=999)
    """how many are tried first"""
    refine: int = Field(default=0, ge=0, le=999)
    """so many more around the best one, normally distributed"""
    spread: float = Field(default=0.1, gt=0, le=1)
    """of those: standard deviation as a share of each range"""
    points: int = Field(default=3, ge=1)
    """at most so many weights for each configuration and seed, of an even grid"""
    seeds: int = Field(default=2, ge=1)
    """that choose; the run's own is the first"""
    confirm: int = Field(default=1, ge=1)
    """so many of the best are trained again"""
    held_out_seeds: int = Field(default=2, ge=1)
    """that are used for nothing else"""

    @field_validator("space")
    @classmethod
    def _usable(cls, value: dict[str, Range | list[Any]]) -> dict[str, Range | list[Any]]:
        for key, allowed in value.items():
            if key == "seed":
                raise ValueError("seed: it is no hyper-parameter; see seeds and held_out_seeds")
            if isinstance(allowed, list) and not allowed:
                raise ValueError(f"{key}: the list is empty")
            ends = (allowed.low, allowed.high) if isinstance(allowed, Range) and key in _WHOLE else ()
            if not all(end.is_integer() for end in ends):
                raise ValueError(f"{key}: low and high must be whole numbers")
        return value

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        refuse(space, "hyper-parameters", "trains candidates with different settings")
        known = {outcome.id: outcome for outcome in history}
        points = [*cube(len(self.space), self.configurations, rng)]
        steps = [[rng.gauss(0, self.spread) for _ in self.space] for _ in range(self.refine)]
        tuning = range(self.seeds)
        tried = self._configurations(points)
        wanted = self._candidates(tried, tuning, space)
        if all(candidate.id in known for candidate in wanted) and self.refine:
            best = self._best(tried, known, space)
            for identity in best[:1]:
                centre = points[int(identity[1:])]
                points += [[_reflected(one + by) for one, by in zip(centre, step, strict=True)] for step in steps]
                tried = self._configurations(points)
                wanted = self._candidates(tried, tuning, space)
        if all(candidate.id in known for candidate in wanted):
            best = self._best(tried, known, space)[: self.confirm]
            again = {identity: tried[identity] for identity in best} | ({"default": {}} if best else {})
            held_out = range(self.seeds, self.seeds + self.held_out_seeds)
            wanted = self._candidates(again, held_out, space)
        return [candidate for candidate in wanted if candidate.id not in known]

    def later_changes(self, space: Space) -> list[Changes]:
        """Both ends of each range, and every value of each list."""
        return [
            {key: value}
            for key, allowed in self.space.items()
            for value in (
                allowed if isinstance(allowed, list) else (_value(key, allowed, 0.0), _value(key, allowed, 1.0))
            )
        ]

    def _configurations(self, points: Sequence[Sequence[float]]) -> dict[str, Changes]:
        """Id -> changes, of points in the unit cube; those that say the same as an earlier one are left out."""
        made: dict[str, Changes] = {}
        for place, point in enumerate(points):
            shares = zip(self.space.items(), point, strict=True)
            changes = {key: _value(key, allowed, share) for (key, allowed), share in shares}
            if changes not in made.values():
                made[f"c{place:03d}"] = changes
        return made

    def _candidates(self, configurations: Mapping[str, Changes], seeds: Sequence[int], space: Space) -> list[Candidate]:
        grid = Grid(points=self.points).candidates(space)
        return [
            replace(
                point,
                id=_id(f"{identity}-s{seed}", place, point),
                changes={**changes, "seed": (space.seed + seed) % _LARGEST_SEED},
            )
            for identity, changes in configurations.items()
            for seed in seeds
            for place, point in enumerate(grid)
        ]

    def _best(self, tried: Mapping[str, Changes], known: Mapping[str, Outcome], space: Space) -> list[str]:
        """Ids of those of which anything succeeded, the best first, the first of equals."""
        reference = _reference(space)
        scores: dict[str, float] = {}
        for identity, changes in tried.items():
            candidates = self._candidates({identity: changes}, range(self.seeds), space)
            done = [each for each in candidates if known[each.id].status == "done"]
            if done:
                points = [values(known[each.id], space) for each in done]
                volumes = hypervolumes(points, [each.changes["seed"] for each in done], reference)
                scores[identity] = round(sum(volumes.values()) / self.seeds, 12)
        return sorted(scores, key=lambda identity: -scores[identity])


def _reference(space: Space) -> tuple[float, ...]:
    if not space.reference_point:
        raise ConfigError(
            "search: 'hyper-parameters' compares hypervolumes, and from where they are measured is not known; set "
            "evaluate.reference_point"
        )
    return tuple(space.reference_point[name] for name in space.objectives)


def _value(key: str, allowed: Range | list[Any], share: float) -> Any:
    """What a key gets at a share in [0,1] of what is allowed."""
    if isinstance(allowed, list):
        return allowed[min(int(share * len(allowed)), len(allowed) - 1)]
    found = allowed.at(share)
    return round(found) if key in _WHOLE else found


def _reflected(share: float) -> float:
    """Back into [0,1] as from a mirror at each end."""
    share %= 2.0
    return min(share, 2.0 - share)


def _id(trained: str, place: int, point: Candidate) -> str:
    """As ``c003-s1-w-0.50-0.50``; a weight that is too long for the name of a folder has its place in the grid."""
    identity = f"{trained}-{point.id}"
    return identity if len(identity) <= _LONGEST else f"{trained}-{place:04d}"

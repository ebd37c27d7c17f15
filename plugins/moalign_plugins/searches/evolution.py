"""Weights, or mixes of a few adapters, bred over generations from the best so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import fsum
from random import Random
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from moalign.api import Candidate, ConfigError, Outcome, Preference, Search, Space, values
from moalign_plugins.searches._one_model import refuse
from moalign_plugins.searches.grid import Grid, nearest

if TYPE_CHECKING:
    from moalign_plugins.searches._genetic import Breeding, Genome

REGISTRATION = {
    "name": "evolution",
    "class": "Evolution",
    "summary": "weights, or mixes of a few adapters, bred by NSGA-II or NSGA-III",
}

STRONGEST = 1.2  # of what the parents add to the base


class Evolution(Search):
    """Generations of NSGA-II (one and two objectives) or NSGA-III (more), by pymoo's ask and tell.

    The first generation is each objective alone, an even grid inside the simplex, and random points up to
    ``population``; each of the others is bred from the best of all before it, by what was measured of them, the KL paid
    for. Genomes are in steps of 0.001, and none comes twice. A candidate that fails or is skipped has no offspring.
    ``generations`` counts the first. The whole is replayed from the history at every call.

    ``vary: preferences`` trains every candidate for its weights; from the second generation on from the adapter of the
    nearest that is done. ``vary: mixes`` trains a coarse grid alone: the genome is how much of each of these adapters
    is mixed, which costs an evaluation. A mix stands at the mean of its parents' weights by its shares; where these do
    not add up to 1 (``strength``), at that mean divided by their sum.
    """

    vary: Literal["preferences", "mixes"] = "preferences"
    """what is bred: weights to train for, or mixes of trained adapters"""
    population: int = Field(default=12, ge=2, le=500)
    """candidates in a generation; at least one for each objective"""
    generations: int = Field(default=4, ge=1, le=100)
    """how many, the first among them"""
    warm_steps: float | None = Field(default=0.15, gt=0, le=1)
    """with preferences: share of train.steps from the nearest adapter, after the first generation; null: all, from
    fresh weights"""
    trained: int = Field(default=1, ge=1)
    """with mixes: at most so many candidates are trained, of an even grid, but one for each objective is"""
    strength: bool = False
    """with mixes: also breed how far the mix goes, from almost the base (0.01) past the mix itself (1) to 1.2"""

    @model_validator(mode="after")
    def _together(self) -> Evolution:
        if self.vary == "preferences" and (self.strength or self.trained != 1):
            raise ValueError("strength and trained are for vary: mixes")
        if self.trained > self.population:
            raise ValueError(f"population ({self.population}) must be at least trained ({self.trained})")
        return self

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        from moalign_plugins.searches._genetic import Breeding

        objectives = len(space.objectives)
        if self.population < objectives:
            raise ConfigError(
                f"search.population: {self.population} cannot hold one for each of {objectives} objectives"
            )
        seed, outcomes = rng.getrandbits(63), {outcome.id: outcome for outcome in history}
        parents: list[Candidate] = []
        if self.vary == "mixes":
            refuse(space, "evolution", "with vary: mixes mixes candidates")
            trained = Grid(points=max(self.trained, objectives)).candidates(space)
            if missing := [candidate for candidate in trained if candidate.id not in outcomes]:
                return missing
            parents = [candidate for candidate in trained if outcomes[candidate.id].status == "done"]
            if not parents:
                return []
        strength = STRONGEST if self.strength else None
        breeding = Breeding(len(parents) or objectives, objectives, self.population, strength, seed)
        return self._next(breeding, parents, space, outcomes)

    def _next(
        self, breeding: Breeding, parents: Sequence[Candidate], space: Space, outcomes: Mapping[str, Outcome]
    ) -> list[Candidate]:
        """What is missing of the first generation that is not whole; the breeding is replayed up to it."""
        genomes, before = breeding.first(), list[Candidate]()
        for generation in range(1, self.generations + 1):
            names = [f"generation-{generation}-{n:0{len(str(self.population - 1))}d}" for n in range(len(genomes))]
            candidates = [
                _mix(name, *breeding.shares(genome), parents, space)
                if parents
                else _trained(name, breeding.shares(genome)[0], space)
                for name, genome in zip(names, genomes, strict=True)
            ]
            if missing := [candidate for candidate in candidates if candidate.id not in outcomes]:
                return missing if parents else self._warm(missing, before, space, outcomes)
            self._tell(breeding, genomes, [outcomes[candidate.id] for candidate in candidates], space)
            before += candidates
            genomes = breeding.offspring()
        return []

    def _tell(self, breeding: Breeding, genomes: Sequence[Genome], outcomes: Sequence[Outcome], space: Space) -> None:
        done = [pair for pair in zip(genomes, outcomes, strict=True) if pair[1].status == "done"]
        breeding.tell([genome for genome, _ in done], [values(outcome, space) for _, outcome in done])

    def _warm(
        self,
        missing: Sequence[Candidate],
        before: Sequence[Candidate],
        space: Space,
        outcomes: Mapping[str, Outcome],
    ) -> list[Candidate]:
        """From the adapter of the nearest that was trained in the generations before; where none was, as they are."""
        ended = [(candidate, outcomes[candidate.id]) for candidate in before]
        done = [candidate for candidate, outcome in ended if outcome.status == "done" and outcome.kind == "trained"]
        if self.warm_steps is None or not done:
            return list(missing)
        steps = {"train.steps": max(1, round(self.warm_steps * space.steps))}
        return [replace(each, parents=(nearest(done, each, space).id,), changes=steps) for each in missing]


def _trained(name: str, weights: Sequence[float], space: Space) -> Candidate:
    return Candidate(name, Preference("weights", dict(zip(space.objectives, weights, strict=True))))


def _mix(name: str, shares: Sequence[float], strength: float, parents: Sequence[Candidate], space: Space) -> Candidate:
    """The parents by these shares times the strength; a parent alone at strength 1 is itself."""
    taken = [(parent, share) for parent, share in zip(parents, shares, strict=True) if share]
    if len(taken) == 1 and strength == 1:
        return taken[0][0]
    weights = {
        objective: fsum(share * parent.preference.values[objective] for parent, share in taken)
        for objective in space.objectives
    }
    parts = {parent.id: share * strength for parent, share in taken}
    return Candidate(name, Preference("weights", weights), mixed=True, shares=parts)

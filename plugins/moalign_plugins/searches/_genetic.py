"""Generations of NSGA-II and NSGA-III by ask and tell of pymoo, replayed from what became of each generation.

A genome is n numbers that are not negative and add up to 1, in steps of 1/1000, and where ``strength`` is given one
more, from 0.01 up to it, in steps of 0.01. In whole steps, so that equal genomes are equal on every machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import comb
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.nsga3 import NSGA3
from pymoo.config import Config
from pymoo.core.evaluator import Evaluator
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.problems.static import StaticProblem
from pymoo.util.ref_dirs import get_reference_directions

Genome = tuple[int, ...]  # steps

STEPS = 1000  # of a share from 0 to 1
STRENGTH_STEPS = 100  # of a strength from 0 to 1
ASKED = 20  # times for one generation, until it is full of genomes that are new
ENDLESS = 10**9  # generations; the search counts them itself

Config.warnings["not_compiled"] = False  # pymoo would print it among what the command prints


class Breeding:
    """One run of the algorithm: ``first`` and ``offspring`` give genomes, ``tell`` what the finished ones reached.

    NSGA-II (Deb et al. 2002) for one and two objectives, NSGA-III (Deb and Jain 2014) for more, with simulated binary
    crossover and polynomial mutation. Children are brought back to the simplex by division by their sum. All random
    numbers come from generators made of ``seed``.
    """

    def __init__(self, parents: int, objectives: int, population: int, strength: float | None, seed: int) -> None:
        self.parents, self.population, self.strength = parents, population, strength
        self.objectives = objectives
        self.random = np.random.default_rng(seed)
        self.seed = int(self.random.integers(2**31))
        self.seen: set[Genome] = set()
        variables = parents + (strength is not None)
        upper = np.ones(variables)
        if strength is not None:
            upper[-1] = strength
        self.problem = Problem(n_var=variables, n_obj=objectives, xl=np.zeros(variables), xu=upper)
        self.algorithm: Any = None

    def first(self) -> list[Genome]:
        """The corners of the simplex, an even grid inside it, and random points (Dirichlet) up to the population.

        With ``strength`` the corners have strength 1, and the others strengths spread evenly, in random order.
        """
        points = [*np.eye(self.parents).tolist(), *_inside(self.parents, self.population - self.parents)]
        more = max(0, self.population - len(points)) if self.parents > 1 or self.strength is not None else 0
        points += self.random.dirichlet(np.ones(self.parents), more).tolist()
        genomes = [_whole(point) for point in points]
        if self.strength is not None:
            free = max(0, len(genomes) - self.parents)
            spread = self.random.permutation((np.arange(free) + 0.5) / max(free, 1) * self.strength)
            strengths = [1.0] * self.parents + spread.tolist()
            genomes = [(*g, _strength(s)) for g, s in zip(genomes, strengths, strict=True)]
        return self._new(genomes)

    def tell(self, genomes: Sequence[Genome], values: Sequence[Sequence[float]]) -> None:
        """What genomes of the last generation reached, all objectives larger is better; those left out are lost."""
        if not genomes:
            return
        reached = np.negative(np.asarray(values, dtype=np.float64))
        with warnings.catch_warnings():  # pymoo changes what is warned of, and for good
            told = Population.new("X", np.array([self._numbers(genome) for genome in genomes]))
            Evaluator().eval(StaticProblem(self.problem, F=reached), told)
            if self.algorithm is None:
                self.algorithm = self._algorithm(told)
            self.algorithm.tell(infills=told)

    def offspring(self) -> list[Genome]:
        """The next generation, at most of the population's size, of genomes that never were; none: nothing is left."""
        found: list[Genome] = []
        for _ in range(ASKED if self.algorithm is not None else 0):
            asked = self.algorithm.ask()
            children = [] if asked is None else cast("NDArray[np.float64]", asked.get("X")).tolist()
            found += self._new([self._genome(child) for child in children])
            if len(found) >= self.population:
                break
        kept = found[: self.population]
        self.seen.difference_update(found[self.population :])
        return kept

    def shares(self, genome: Genome) -> tuple[tuple[float, ...], float]:
        """Shares, which add up to 1, and the strength."""
        strength = 1.0 if self.strength is None else genome[-1] / STRENGTH_STEPS
        return tuple(steps / STEPS for steps in genome[: self.parents]), strength

    def _algorithm(self, first: Population) -> Any:
        options: dict[str, Any] = {"pop_size": self.population, "sampling": first, "eliminate_duplicates": False}
        # farther from the parents than is usual (15 to 30): a search has tens of candidates, not thousands
        options |= {"crossover": SBX(eta=2, prob=1.0, prob_var=1.0), "mutation": PM(eta=5)}
        if self.objectives <= 2:
            algorithm: Any = NSGA2(**options)
        else:
            directions = np.array(_even(self.objectives, self.population))
            algorithm = NSGA3(directions, **options)
        algorithm.setup(self.problem, termination=("n_gen", ENDLESS), seed=self.seed, verbose=False)
        algorithm.ask()  # the first generation itself
        return algorithm

    def _new(self, genomes: Sequence[Genome]) -> list[Genome]:
        """Those that never were, each once."""
        found = []
        for genome in genomes:
            if genome not in self.seen:
                self.seen.add(genome)
                found.append(genome)
        return found

    def _numbers(self, genome: Genome) -> list[float]:
        shares, strength = self.shares(genome)
        return [*shares, *([] if self.strength is None else [strength])]

    def _genome(self, child: Sequence[float]) -> Genome:
        whole = _whole(child[: self.parents])
        return whole if self.strength is None else (*whole, _strength(child[-1]))


def _even(parts: int, most: int) -> list[list[float]]:
    """An even (Das-Dennis) grid of at most so many points over the simplex, but one for each corner; corners first.

    Where it is too coarse to have points inside, it gets a second layer of half the size, if there is room (Deb and
    Jain 2014).
    """
    if parts == 1:
        return [[1.0]]
    partitions = _partitions(parts, most)
    points = _grid(parts, partitions)
    room = most - len(points)
    if partitions < parts <= room:
        points = np.vstack([points, (_grid(parts, _partitions(parts, room)) + 1 / parts) / 2])
    rows = [[round(number, 12) for number in row] for row in points.tolist()]
    return sorted((row for row in rows if 1.0 in row), reverse=True) + [row for row in rows if 1.0 not in row]


def _inside(parts: int, most: int) -> list[list[float]]:
    """Of the finest even grid that has at most so many points inside the simplex those that are inside."""
    if most < 1 or parts == 1:
        return []
    partitions = parts
    while comb(partitions, parts - 1) <= most:
        partitions += 1
    return [row for row in _grid(parts, partitions).tolist() if min(row) > 1e-9]


def _grid(parts: int, partitions: int) -> NDArray[np.float64]:
    return np.asarray(get_reference_directions("das-dennis", parts, n_partitions=partitions), dtype=np.float64)


def _partitions(parts: int, most: int) -> int:
    """Of the finest grid that has at most so many points, but 1 at least."""
    n = 1
    while comb(n + parts, parts - 1) <= most:
        n += 1
    return n


def _strength(strength: float) -> int:
    return max(1, round(strength * STRENGTH_STEPS))


def _whole(point: Sequence[float]) -> Genome:
    """Shares in the ratio of these numbers, in whole steps that add up to STEPS: those cut most get one more."""
    total = sum(point)
    exact = [STEPS * number / total for number in point] if total > 1e-9 else [STEPS / len(point)] * len(point)
    steps = [int(round(number, 6)) for number in exact]
    cut = sorted(range(len(exact)), key=lambda k: round(steps[k] - exact[k], 6))
    for k in cut[: STEPS - sum(steps)]:
        steps[k] += 1
    return tuple(steps)

"""Fronts as mathematics: measures of a set of points, what mixtures add to it, what it lacks at most, and chance.

Objectives are maximised everywhere. Libraries are loaded where they are used.
"""

from moalign.pareto.attainment import attainment, band
from moalign.pareto.bounds import Gap, best_corners, gap, hypervolume_at_most, most, unbounded
from moalign.pareto.chance import Z, differ, expected_utility_error, standard_error_clustered
from moalign.pareto.grid import even_weights, grid
from moalign.pareto.knee import knee_plane
from moalign.pareto.measures import (
    contributions,
    expected_utility,
    hypervolume,
    hypervolumes,
    igd_plus,
    non_dominated,
    sparsity,
)
from moalign.pareto.mixtures import hypervolume_of_mixtures, mixture_dominated

__all__ = [
    "Gap",
    "Z",
    "attainment",
    "band",
    "best_corners",
    "contributions",
    "differ",
    "even_weights",
    "expected_utility",
    "expected_utility_error",
    "gap",
    "grid",
    "hypervolume",
    "hypervolume_at_most",
    "hypervolume_of_mixtures",
    "hypervolumes",
    "igd_plus",
    "knee_plane",
    "mixture_dominated",
    "most",
    "non_dominated",
    "sparsity",
    "standard_error_clustered",
    "unbounded",
]

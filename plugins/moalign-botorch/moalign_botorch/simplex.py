"""Weights: points of the simplex, in millionths, and sets of them that fill it."""

from __future__ import annotations

from collections.abc import Sequence
from math import dist, floor
from random import Random

Weights = tuple[float, ...]

NEAR = 1e-3  # Euclidean; weights nearer than this are the same to a search
_MILLION = 10**6
_POOL = 512


def rounded(point: Sequence[float]) -> Weights:
    """In millionths that add up to a million; what lies below 0 counts as 0. The largest remainders are rounded up."""
    positive = [max(0.0, value) for value in point]
    shares = [value / sum(positive) * _MILLION for value in positive]
    parts = [floor(share) for share in shares]
    largest = sorted(range(len(parts)), key=lambda i: parts[i] - shares[i])
    for index in largest[: _MILLION - sum(parts)]:
        parts[index] += 1
    return tuple(part / _MILLION for part in parts)


def corners(objectives: int) -> list[Weights]:
    """Each objective alone."""
    return [tuple(float(i == j) for j in range(objectives)) for i in range(objectives)]


def away(point: Weights, known: Sequence[Weights]) -> float:
    """Distance to the nearest; infinite where nothing is known."""
    return min((dist(point, other) for other in known), default=float("inf"))


def is_near(point: Weights, known: Sequence[Weights]) -> bool:
    return away(point, known) < NEAR


def draw(count: int, objectives: int, rng: Random) -> list[Weights]:
    """Uniform on the simplex: exponential variables over their sum."""
    return [rounded([rng.expovariate(1.0) for _ in range(objectives)]) for _ in range(count)]


def filling(count: int, objectives: int, known: Sequence[Weights], rng: Random) -> list[Weights]:
    """One after the other the weights farthest from all before them and from those known, of the middle and many
    drawn; fewer than ``count`` where all are near."""
    pool = [rounded([1.0] * objectives), *draw(_POOL, objectives, rng)]
    chosen: list[Weights] = []
    while len(chosen) < count:
        point = max(pool, key=lambda each: round(away(each, [*known, *chosen]), 9))
        if is_near(point, [*known, *chosen]):
            break
        chosen.append(point)
    return chosen

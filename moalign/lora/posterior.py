"""Gaussian posteriors of adapters, weight by weight, and their convex combinations: IBCL, arXiv 2305.14782.

A posterior has a mean and a standard deviation for each number in the factors A and B of an adapter, found from the
last iterates of its training (the diagonal of SWAG, arXiv 1902.02476), and no correlations. For a preference between
trained ones the posteriors are combined, m = sum_i w_i m_i and d = sum_i w_i d_i, and weights are drawn from it.

Deviations are averaged, not variances. So d^2 <= sum_i w_i d_i^2 <= sum_i w_i (d_i^2 + (m_i - m)^2), which is the
variance of the mixture that picks posterior i with probability w_i: the combination is narrower than that mixture. Its
quantiles are the weighted means of the quantiles; it is the 2-Wasserstein barycentre of the Gaussians.

What is combined are factors, which ``mixing`` never does, and B A is no linear function of them: with B = sum_i w_i B_i
and A = sum_i w_i A_i

    B A  =  sum_i w_i B_i A_i  -  1/2 sum_ij w_i w_j (B_i - B_j) (A_i - A_j)

It assumes that the factors of all candidates are written in one basis, for B A is the same with B T and T^-1 A. The
candidates of a run start from the same first weights and move little, or from the adapter of another that did: so the
differences are small, and the last term is of their second order. Factors from anywhere else are not comparable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from moalign.errors import MoalignError

Tensors = Mapping[str, Tensor]

SIMPLEX = 1e-9  # as far as weights may miss the sum 1 by rounding


@dataclass(frozen=True)
class Posterior:
    """``mean`` and ``deviation`` (standard, not negative) of each weight, in tensors of the same names and shapes."""

    mean: Tensors
    deviation: Tensors


# --- from iterates --------------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Of ``count`` snapshots of tensors: their ``mean``, and the sum of ``squares`` of their distances from it.

    Both in float64 and updated one snapshot at a time (Welford 1962), which is the mean of squares less the square of
    the mean, without their cancellation: late iterates differ by a small part of what they are.
    """

    count: int = 0
    mean: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def note(self, tensors: Tensors) -> None:
        """One more snapshot, with the names and shapes of those before; the tensors are only read."""
        if not self.count:
            zero = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors.items()}
            self.mean, self.squares = zero, {name: torch.zeros_like(tensor) for name, tensor in zero.items()}
        self.count += 1
        for name, tensor in tensors.items():
            moved = tensor.double() - self.mean[name]
            self.squares[name].addcmul_(moved, moved, value=(self.count - 1) / self.count)
            self.mean[name].add_(moved, alpha=1 / self.count)


def fit(moments: Moments) -> Posterior:
    """Mean and deviation of the snapshots, the latter over their number (not one less), as SWAG has it.

    Raises MoalignError where there are no snapshots. Of a single one all deviations are 0.
    """
    if not moments.count:
        raise MoalignError("there are no snapshots to find a posterior from")
    deviation = {name: (squares / moments.count).sqrt() for name, squares in moments.squares.items()}
    return Posterior(dict(moments.mean), deviation)


# --- between preferences --------------------------------------------------------------------------------------------


def combine(posteriors: Sequence[Posterior], weights: Sequence[float]) -> Posterior:
    """Mean sum_i w_i m_i and deviation sum_i w_i d_i, in float64; with w one-hot that posterior to the last bit.

    Raises MoalignError where the weights are negative or do not sum to 1 (nothing is renormalised), or the posteriors
    are not of the same names and shapes.
    """
    _check_simplex(weights, len(posteriors))
    first = _shapes(posteriors[0])
    for place, posterior in enumerate(posteriors):
        if _shapes(posterior) != first:
            raise MoalignError(f"posterior {place} has not the tensors of the first, so they cannot be combined")
    used = [(posterior, weight) for posterior, weight in zip(posteriors, weights, strict=True) if weight]

    mean = _averaged([(posterior.mean, weight) for posterior, weight in used])
    return Posterior(mean, _averaged([(posterior.deviation, weight) for posterior, weight in used]))


def _averaged(parts: Sequence[tuple[Tensors, float]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for tensors, weight in parts:
        for name, tensor in tensors.items():
            mine = weight * tensor.double()
            total[name] = total[name] + mine if name in total else mine
    return total


def distance(one: Posterior, other: Posterior) -> float:
    """|m - m'| / n + |d - d'| / n over all n weights together, with Euclidean norms: the mean distance of the paper's
    code (which takes every deviation twice, and so their norm by a factor of sqrt(2) less)."""
    if _shapes(one) != _shapes(other):
        raise MoalignError("the posteriors have not the same tensors, so there is no distance between them")
    number = sum(tensor.numel() for tensor in one.mean.values())
    parts = ((one.mean, other.mean), (one.deviation, other.deviation))
    return sum(math.hypot(*(float((a[n].double() - b[n].double()).norm()) for n in a)) for a, b in parts) / number


def distinct(posteriors: Mapping[str, Posterior], tolerance: float) -> tuple[dict[str, Posterior], dict[str, str]]:
    """Those that are kept, and for each that is not the kept one that stands for it.

    In the order given, one is dropped where its nearest kept one lies within ``tolerance``. A substitute is itself
    kept, so nothing is further than the tolerance from what stands for it. Raises MoalignError for a tolerance below 0.
    """
    if not 0 <= tolerance < math.inf:
        raise MoalignError(f"tolerance {tolerance}: a finite number from 0 on is needed")
    kept: dict[str, Posterior] = {}
    substitutes: dict[str, str] = {}
    for name, posterior in posteriors.items():
        distances = {other: distance(posterior, found) for other, found in kept.items()}
        nearest = min(distances, key=distances.__getitem__, default=None)
        if nearest is not None and distances[nearest] <= tolerance:
            substitutes[name] = nearest
        else:
            kept[name] = posterior
    return kept, substitutes


# --- a draw ---------------------------------------------------------------------------------------------------------


def half_width(mass: float) -> float:
    """In deviations, of the central interval in which a Gaussian has the probability ``mass``: its quantiles are
    (1 - mass) / 2 and 1 - (1 - mass) / 2. Raises MoalignError unless 0 <= mass < 1."""
    if not 0 <= mass < 1:
        raise MoalignError(f"mass {mass}: a probability from 0 to below 1 is needed; all of it has no bounds")
    return abs(NormalDist().inv_cdf((1 - mass) / 2))


def bounds(posterior: Posterior, mass: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Lower and upper end of the central interval of every weight, in float64."""
    width = half_width(mass)
    both = {name: (mean.double(), posterior.deviation[name].double()) for name, mean in posterior.mean.items()}
    lower = {name: mean - width * deviation for name, (mean, deviation) in both.items()}
    return lower, {name: mean + width * deviation for name, (mean, deviation) in both.items()}


def draw(posterior: Posterior, mass: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights from a uniform distribution over their central intervals, in float64; with mass 0 the mean.

    Each weight is its own draw (the paper's code draws one number for all weights of a tensor). A function of the
    generator (on the CPU), of the names in their alphabetical order, and of shapes: between posteriors of the same
    tensors one generator draws the same quantiles, so what is drawn moves continuously with both.
    """
    width, drawn = half_width(mass), {}
    for name in sorted(posterior.mean):
        mean, deviation = posterior.mean[name].double(), posterior.deviation[name].double()
        place = torch.rand(mean.shape, generator=generator, dtype=torch.float64).to(mean.device) * 2 - 1
        drawn[name] = mean + width * deviation * place
    return drawn


def _shapes(posterior: Posterior) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in posterior.mean.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in posterior.deviation.items()}:
        raise MoalignError("mean and deviation of a posterior have not the same tensors")
    return shapes


def _check_simplex(weights: Sequence[float], number: int) -> None:
    if not weights or len(weights) != number or not all(0 <= weight < math.inf for weight in weights):
        raise MoalignError(f"weights {list(weights)} of {number} posteriors: a finite number of 0 or more for each")
    total = math.fsum(weights)
    if abs(total - 1) > SIMPLEX:
        raise MoalignError(f"weights {list(weights)} add up to {total:.12g}, not 1")

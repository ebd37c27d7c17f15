"""First-order hypergradients by a penalty: how an outer loss changes with the weights that an inner problem is given.

The inner problem at one prompt is g(w, y) = -E_y[w . r] + beta KL(y || ref), whose minimiser is y* = ref exp(w . r /
beta) / Z; the outer one is F(w) = f(w, y*). ``y`` [G]: the probabilities of G responses; ``rewards`` [G,M] theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OuterLoss:
    """f at a distribution y over G responses: ``value`` [], the functional derivative ``slopes`` [G], known but for a
    number, and ``direct`` [M], df/dw with y held. ``degree``: of f as a polynomial in y."""

    value: Tensor
    slopes: Tensor
    direct: Tensor
    degree: int


def lost_return(y: Tensor, rewards: Tensor, outer: Tensor) -> OuterLoss:
    """f = -E_y[r_outer]; ``outer`` [G]."""
    return OuterLoss(-(y @ outer), -outer, rewards.new_zeros(rewards.shape[1]), degree=1)


def disagreement(pairs: Tensor, rewards: Tensor, outer: Tensor, weights: Tensor, tau: float) -> OuterLoss:
    """f = E_{a,b}[-log sigmoid(s (w . r(a) - w . r(b)) / tau)], s the sign of r_outer(a) - r_outer(b); a tie counts 0.

    ``pairs`` [G,G]: the probabilities of (a, b), symmetric; see ``independent`` and ``without_repetition``.
    """
    from torch.nn.functional import softplus

    signs = (outer[:, None] - outer[None, :]).sign()
    total = rewards @ weights
    wrong = -signs * (total[:, None] - total[None, :]) / tau
    losses = pairs * softplus(wrong) * signs.abs()
    pulls = pairs * wrong.sigmoid() * signs / tau  # antisymmetric
    return OuterLoss(losses.sum(), 2 * losses.sum(1) / pairs.sum(1), -2 * pulls.sum(1) @ rewards, degree=2)


def independent(y: Tensor) -> Tensor:
    """The probabilities of two responses drawn from y one after the other, [G,G]."""
    return y[:, None] * y[None, :]


def without_repetition(y: Tensor) -> Tensor:
    """Those of two different ones among G drawn from a policy, of equal probability y = 1/G; [G,G]."""
    import torch

    size = len(y)
    return (1 - torch.eye(size, dtype=y.dtype, device=y.device)) / (size * (size - 1))


def first_order(direct: Tensor, at_penalised: Tensor, at_optimum: Tensor, sigma: float) -> Tensor:
    """df/dw + (dg/dw(w, y_sigma) - dg/dw(w, y*)) / sigma: the hypergradient dF/dw, but for O(sigma); [M] each.

    y_sigma minimises sigma f + g. With df/dw at y_sigma it is the gradient of (min_y (sigma f + g) - min_y g) / sigma.
    """
    return direct + (at_penalised - at_optimum) / sigma


def penalised(y: Tensor, slopes: Tensor, ratio: float) -> Tensor:
    """y exp(-ratio f') / Z, with ratio = sigma / beta: what minimises sigma f + g where y does g; [G].

    Exactly for an f that is linear in y, to first order in sigma otherwise, as f' is that at y.
    """
    return (y.log() - ratio * slopes).softmax(0)


def hypergradient(
    y: Tensor, rewards: Tensor, outer: OuterLoss, beta: float, sigma: float, draws: bool = False
) -> Tensor:
    """dF/dw_k of one prompt [M], where y minimises the inner problem, and dg/dw_k = -E_y[r_k].

    ``draws``: y are G responses sampled from the minimiser, each with 1/G. For an f of degree d, whose slope is a mean
    over d - 1 other draws, the covariance of slopes and rewards over the draws is on average (G - d) / G of the
    minimiser's; that is made up for, so that the estimate is unbiased as sigma -> 0.
    """
    share = (len(y) - outer.degree) / len(y) if draws else 1.0
    moved = penalised(y, outer.slopes, sigma / beta)
    return first_order(outer.direct, -(moved @ rewards), -(y @ rewards), sigma * share)

"""Steps of weights that stay positive, add up to 1 and keep a floor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def ascended(weights: Tensor, slopes: Tensor, step: float) -> Tensor:
    """Exponentiated gradient ascent, w_k exp(step s_k) / sum_j w_j exp(step s_j); positive weights, slopes [K] -> [K].

    A number added to all slopes changes nothing.
    """
    return (weights.log() + step * slopes).softmax(0)


def floored(weights: Tensor, floors: Tensor) -> Tensor:
    """The nearest weights (in KL from them) that are at least ``floors``, whose sum is below 1; [K] -> [K].

    Those below their floor are set to it, and the others shrink in proportion until all are above.
    """
    low = weights < floors
    while bool(low.any()):
        left = 1 - floors[low].sum()
        shrunk = weights * left / weights[~low].sum()
        lower = low | (shrunk < floors)
        if bool((lower == low).all()):
            return floors.where(low, shrunk)
        low = lower
    return weights

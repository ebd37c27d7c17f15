"""The shortest combination of the objectives' gradients."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

from moalign_plugins.combiners._gradients import OverGradients

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "mgda",
    "class": "MGDA",
    "summary": "weights of each round that combine the gradients to the shortest, which improves all objectives",
    "paper": "doi:10.1016/j.crma.2012.03.014, arXiv:1810.04650",
}

ROUNDING = 1e-14  # of shares, and of squares in units of all gradients' lengths


class MGDA(OverGradients):
    """c_k = a_k / w_k, a the shares (not negative, sum 1) for which sum_k a_k g_k / w_k is shortest. Désidéri 2012.

    That combination d has <d, g_k> >= w_k |d|^2: every objective gains, and where the bound is met in proportion to its
    weight. It is why gradients are divided by the weights: times them, the objective of the larger weight would gain
    less. For gradients of one length that are orthogonal, c is the preference.

    Where gradients point against each other d is 0 and only the KL has a gradient left. The shortest combination leans
    to short gradients, so that without ``normalise`` a reward in small units decides, and one whose gradient is 0 stops
    the others. arXiv 1810.04650 walks to the shares (Frank-Wolfe); here they are exact, by the shortest point of every
    set of objectives, of which there are 2^K - 1: for ten objectives, some hundredths of a second in each round.
    """

    requires: ClassVar[Mapping[str, str]] = {}
    called: ClassVar[str] = "mgda"

    normalise: bool = True
    """bring every gradient to length 1 first, so that the unit of a reward does not matter; an objective without a
    gradient in a round then has no weight in it"""

    def scales(self, preference: Tensor) -> Tensor:
        return 1 / preference

    def shares(self, gram: Tensor) -> Tensor:
        return shortest(gram)


def shortest(gram: Tensor) -> Tensor:
    """The shares a (not negative, sum 1) with the least a' G a; float64 [K,K] of trace 1 -> [K].

    Where many are equally short, those of the most objectives, and of these the most even ones.
    """
    size = len(gram)
    best, least = gram.new_full((size,), 1 / size), float("inf")
    for number in range(size, 0, -1):
        for members in map(list, combinations(range(size), number)):
            found = gram.new_zeros(size)
            found[members] = shortest_of_plane(gram[members][:, members])
            square = float(found @ gram @ found)
            if bool((found >= -ROUNDING).all()) and square < least - ROUNDING:
                best, least = found.where(found > ROUNDING, 0.0), square
    return best / best.sum()


def shortest_of_plane(gram: Tensor) -> Tensor:
    """The most even numbers that sum to 1 and have the least a' G a, of either sign; [K,K] -> [K]."""
    import torch

    size = len(gram)
    even = gram.new_full((size,), 1 / size)
    across = torch.eye(size, dtype=gram.dtype, device=gram.device) - 1 / size  # onto what sums to 0
    return even - torch.linalg.pinv(across @ gram @ across, atol=ROUNDING, hermitian=True) @ (across @ gram @ even)

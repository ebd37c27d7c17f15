"""Weighted Chebyshev distance to an ideal point."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign_plugins.combiners._ideal_point import TowardsIdeal

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "chebyshev",
    "class": "Chebyshev",
    "summary": "minus the largest weighted shortfall from an ideal reward; reaches concave parts of a front",
}


class Chebyshev(TowardsIdeal):
    """u = -max_k w_k (z_k - r_k) over the objectives with weight; z is the ideal reward (Bowman 1976).

    A weighted sum only ever picks corners of the convex hull of the responses; this picks any that is not dominated, as
    long as rewards stay below the ideal. It is taken of each response, and -max is concave: the mean that is maximised
    is at most the u of the mean rewards.

    On labelled pairs max_k w_k (L_k - ideal_loss_k) is minimised, over the objectives' mean losses: each step follows
    w_k grad L_k of the objective that is worst in it, the exact gradient where one is (equal ones share it, a
    subgradient). See OverLosses.
    """

    called: ClassVar[str] = "chebyshev"

    def reduced(self, shortfalls: Tensor) -> Tensor:
        return -shortfalls.amax(-1)

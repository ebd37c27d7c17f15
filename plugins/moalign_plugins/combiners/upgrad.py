"""The objectives' gradients, each made to harm none of them, summed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from moalign_plugins.combiners._gradients import OverGradients

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "upgrad",
    "class": "UPGrad",
    "summary": "weighted sum whose weights of each round are raised until no objective loses",
    "paper": "arXiv:2406.16232",
}

RIDGE = 1e-8  # on the diagonal of a Gram matrix of trace 1, so that the program has one solution


class UPGrad(OverGradients):
    """c_k = w_k v_k with sum_k c_k g_k = sum_k P(w_k g_k), P the nearest that harms no objective. arXiv 2406.16232.

    P(x) is the projection onto the directions d with <d, g_k> >= 0 for all k. So no objective loses to first order, a
    weight only grows (v_k >= 1), and where no two gradients are against each other c is the preference: the weighted
    sum. Two opposite gradients cancel. The conditions do not depend on lengths, the sum does, as in a weighted sum.
    """

    requires: ClassVar[Mapping[str, str]] = {name: "moalign[torchjd]" for name in ("torchjd", "qpsolvers", "quadprog")}

    called: ClassVar[str] = "upgrad"

    def shares(self, gram: Tensor) -> Tensor:
        import torch
        from torchjd.aggregation import UPGradWeighting
        from torchjd.linalg import QuadprogProjector

        projector = QuadprogProjector(norm_eps=0.0, reg_eps=RIDGE)
        weighting: Any = UPGradWeighting(torch.ones_like(gram[0]), projector)
        return weighting(gram)

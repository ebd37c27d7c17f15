"""Near the weighted sum, the direction that is best for the objective that it serves worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign_plugins.combiners._gradients import OverGradients

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "cagrad",
    "class": "CAGrad",
    "summary": "weights of each round near the weighted sum that serve the worst served objective best",
    "paper": "arXiv:2110.14048",
}

NOTHING = 1e-4  # the length, beside all gradients' together, below which a combination is taken for 0


class CAGrad(OverGradients):
    """sum_k c_k g_k is the d that maximises min_k w_k <d, g_k> with |d - g| <= radius |g|, g = sum_k w_k g_k.

    arXiv 2110.14048, with w_k g_k as the gradients. It is g + radius |g| h / |h|, where h = sum_k a_k w_k g_k for the
    shares a that are worst for it. With ``radius`` 0 it is the weighted sum. Where h is 0 the gradients have a
    combination that is 0, and c is 0 in that round: only the KL has a gradient. An objective without a gradient of its
    own takes no part. Lengths matter as in a weighted sum.
    """

    requires: ClassVar[Mapping[str, str]] = {name: "moalign[cagrad]" for name in ("torchjd", "cvxpy", "clarabel")}

    called: ClassVar[str] = "cagrad"

    radius: float = Field(default=0.5, ge=0, lt=1)
    """how far from the weighted sum, as a share of its length; the paper's c"""

    def shares(self, gram: Tensor) -> Tensor:
        import torch

        found = torch.ones_like(gram[0])
        if self.radius == 0:
            return found
        from torchjd.aggregation import CAGradWeighting

        moves = gram.diagonal() > NOTHING**2 * gram.diagonal().sum()
        count = int(moves.sum())
        if count:
            weighting: Any = CAGradWeighting(c=self.radius, norm_eps=NOTHING)
            found[moves] = count * weighting(gram[moves][:, moves])  # of their sum, where torchjd has their mean
        return found

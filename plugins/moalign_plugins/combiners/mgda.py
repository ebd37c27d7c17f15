"""The shortest combination of the objectives' gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign_plugins.combiners._gradients import OverGradients

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "mgda",
    "class": "MGDA",
    "summary": "weights of each round that combine the gradients to the shortest, which improves all objectives",
    "paper": "doi:10.1016/j.crma.2012.03.014, arXiv:1810.04650",
}


class MGDA(OverGradients):
    """c_k = a_k / w_k, a the shares (not negative, sum 1) for which sum_k a_k g_k / w_k is shortest. Désidéri 2012.

    That combination d has <d, g_k> >= w_k |d|^2: every objective gains, and where the bound is met in proportion to its
    weight. It is why gradients are divided by the weights: times them, the objective of the larger weight would gain
    less. For gradients of one length that are orthogonal, c is the preference.

    Where gradients point against each other d is 0 and only the KL has a gradient left. The shortest combination leans
    to short gradients, so that without ``normalise`` a reward in small units decides, and one whose gradient is 0 stops
    the others. Frank-Wolfe (arXiv 1810.04650, algorithm 2) by torchjd: exact for two objectives.
    """

    called: ClassVar[str] = "mgda"

    normalise: bool = True
    """bring every gradient to length 1 first, so that the unit of a reward does not matter; an objective without a
    gradient in a round then has no weight in it"""
    iterations: int = Field(default=1000, ge=1)
    """the most steps of Frank-Wolfe, of about 30 microseconds each; three or more objectives may need them"""

    def scales(self, preference: Tensor) -> Tensor:
        return 1 / preference

    def shares(self, gram: Tensor) -> Tensor:
        from torchjd.aggregation import MGDAWeighting

        weighting: Any = MGDAWeighting(epsilon=1e-9, max_iters=self.iterations)
        return weighting(gram)

"""The log-ratio of the adapted model to its base as a reward, learned from pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch
from moalign_plugins.reward_models._heads import of_pairs
from moalign_plugins.reward_models._implicit import Implicit
from moalign_plugins.reward_models._pairwise import logistic

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "implicit",
    "class": "ImplicitFromPairs",
    "summary": "beta times the log-ratio of the adapted model itself, logistic loss on the difference of a pair (DPO)",
    "paper": "arXiv:2305.18290",
}


class ImplicitFromPairs(Implicit):
    """-q log sigmoid(z) - (1 - q) log sigmoid(-z) with z = r(chosen) - r(rejected), q = 1 - e/2, e = label_smoothing.

    r = beta * sum over the response's tokens of (log pi - log pi_ref), with pi the adapted model and pi_ref its base.
    There is no head, and one objective only. arXiv 2305.18290.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "logps", "reference"})

    beta: float = Field(default=0.1, gt=0)
    """units of the reward per nat of log-ratio"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """share of the labels that is replaced by a toss of a coin"""

    @property
    def log_odds(self) -> bool:
        return self.label_smoothing == 0  # else the loss fits another probability

    def loss(self, batch: Batch) -> Tensor:
        chosen, rejected = of_pairs(self.scores(batch), batch)
        return logistic(chosen - rejected, self.label_smoothing)

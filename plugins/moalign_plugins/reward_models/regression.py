"""One linear head per objective, learned from scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch
from moalign_plugins.reward_models._heads import Positive, first_weights, linear_scores
from moalign_plugins.reward_models._labels import FromScores, mean_of_known

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "regression",
    "class": "Regression",
    "summary": "one linear head per objective, squared error on the scores that are known",
    "paper": "arXiv:2402.18571, arXiv:2406.12845",
}


class Regression(FromScores):
    """The mean, over the objectives of which a response has a score s_k, of (r_k - (scale s_k + shift))^2.

    A response with two scores weighs as much as one with five; a score that is missing gives no gradient, and a
    response without any has loss 0. r_k is linear in the final state and without bias, and in the units of
    scale s + shift. HelpSteer's 0 to 4 become 10 to 90 with ``scale: 20`` and ``shift: 10``, as in arXiv 2402.18571.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"final", "rewards"})

    head_lr: Positive = 1.0
    """the head's learning rate, in units of the adapter's"""

    def parameters(self, width: int, objectives: tuple[str, ...], generator: Generator) -> Mapping[str, Tensor]:
        self.check_names(objectives)
        return {"head.weight": first_weights((len(objectives), width), generator)}

    def lr_factor(self, name: str) -> float:
        return self.head_lr

    def loss(self, batch: Batch) -> Tensor:
        targets, known = self.targets(batch)
        return mean_of_known((self.scores(batch) - targets) ** 2, known)

    def scores(self, batch: Batch) -> Tensor:
        return linear_scores(batch)

    def head(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameters["head.weight"]

"""One linear head per objective, learned from scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, ConfigError, PluginError, RewardModel
from moalign_plugins.reward_models._heads import Positive, first_weights, linear_scores

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "regression",
    "class": "Regression",
    "summary": "one linear head per objective, squared error on the scores that are known",
    "paper": "arXiv:2402.18571, arXiv:2406.12845",
}


class Regression(RewardModel):
    """The mean, over the objectives of which a response has a score s_k, of (r_k - (scale s_k + shift))^2.

    A response with two scores weighs as much as one with five; a score that is missing gives no gradient, and a
    response without any has loss 0. r_k is linear in the final state and without bias, and in the units of
    scale s + shift. HelpSteer's 0 to 4 become 10 to 90 with ``scale: 20`` and ``shift: 10``, as in arXiv 2402.18571.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"final", "rewards"})

    scale: Positive | Mapping[str, Positive] = 1.0
    """of all scores, or by objective (1 where it is not named), to bring scores of several sources to one scale"""
    shift: float | Mapping[str, float] = 0.0
    """added to scale times the score; of all, or by objective (0 where it is not named)"""
    head_lr: Positive = 1.0
    """the head's learning rate, in units of the adapter's"""

    def parameters(self, width: int, objectives: tuple[str, ...], generator: Generator) -> Mapping[str, Tensor]:
        for option, given in (("scale", self.scale), ("shift", self.shift)):
            unknown = sorted(set(given) - set(objectives)) if isinstance(given, Mapping) else []
            if unknown:
                raise ConfigError(
                    f"regression: {option}: no objective {unknown[0]!r}; there is {', '.join(objectives)}"
                )
        return {"head.weight": first_weights((len(objectives), width), generator)}

    def lr_factor(self, name: str) -> float:
        return self.head_lr

    def loss(self, batch: Batch) -> Tensor:
        if batch.rewards is None:
            raise PluginError('the reward model reads rewards but does not declare "rewards" in `needs`')
        scores = self.scores(batch)
        known = ~batch.rewards.isnan()
        targets = self.from_labels(batch.rewards.where(known, 0.0), batch.objectives)
        error = (scores - targets).where(known, 0.0)
        return (error**2).sum(1) / known.sum(1).clamp(min=1)

    def scores(self, batch: Batch) -> Tensor:
        return linear_scores(batch)

    def head(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameters["head.weight"]

    def from_labels(self, labels: Tensor, objectives: tuple[str, ...] = ()) -> Tensor:
        """[N,M] in units of the scores, from the units of the data."""
        return labels * _row(self.scale, 1.0, labels, objectives) + _row(self.shift, 0.0, labels, objectives)

    def to_labels(self, scores: Tensor, objectives: tuple[str, ...] = ()) -> Tensor:
        """The inverse of ``from_labels``."""
        return (scores - _row(self.shift, 0.0, scores, objectives)) / _row(self.scale, 1.0, scores, objectives)


def _row(option: float | Mapping[str, float], otherwise: float, like: Tensor, objectives: tuple[str, ...]) -> Tensor:
    """[M], or a single number for all."""
    if not isinstance(option, Mapping):
        return like.new_tensor(option)
    if len(objectives) != like.shape[1]:
        raise PluginError("an option by objective needs `batch.objectives`, which are not supplied")
    return like.new_tensor([option.get(name, otherwise) for name in objectives])

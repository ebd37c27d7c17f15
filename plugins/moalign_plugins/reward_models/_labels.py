"""What forms that learn from scores share: which scores are known, and the units they are brought to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moalign.api import Batch, ConfigError, PluginError, RewardModel
from moalign_plugins.reward_models._heads import Positive

if TYPE_CHECKING:
    from torch import Tensor


class FromScores(RewardModel):
    """Learns scale s + shift from a score s, so that scores of several sources can be brought to one scale."""

    scale: Positive | Mapping[str, Positive] = 1.0
    """of all scores, or by objective (1 where it is not named)"""
    shift: float | Mapping[str, float] = 0.0
    """added to scale times the score; to all, or by objective (0 where it is not named)"""

    def check(self, objectives: tuple[str, ...]) -> None:
        for option, given in (("scale", self.scale), ("shift", self.shift)):
            unknown = sorted(set(given) - set(objectives)) if isinstance(given, Mapping) else []
            if unknown:
                raise ConfigError(
                    f"reward_model.{option}: no objective '{unknown[0]}'; there is {', '.join(objectives)}"
                )

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """In units of the model's scores, [N,M] with 0 where unknown, and which are known, bool [N,M]."""
        if batch.rewards is None:
            raise PluginError('the reward model reads rewards but does not declare "rewards" in `needs`')
        known = ~batch.rewards.isnan()
        like = next(iter(batch.parameters.values()))
        return self.from_labels(batch.rewards.to(like.dtype), batch.objectives).where(known, 0.0), known

    def from_labels(self, labels: Tensor, objectives: tuple[str, ...] = ()) -> Tensor:
        """[N,M] in units of the model's scores, from the units of the data."""
        return labels * _row(self.scale, 1.0, labels, objectives) + _row(self.shift, 0.0, labels, objectives)


def mean_of_known(values: Tensor, known: Tensor) -> Tensor:
    """[N]: of [N,M], over the known ones of each row; 0 where there is none. Unknown ones get no gradient."""
    return values.where(known, 0.0).sum(1) / known.sum(1).clamp(min=1)


def _row(option: float | Mapping[str, float], otherwise: float, like: Tensor, objectives: tuple[str, ...]) -> Tensor:
    """[M], or a single number for all."""
    if not isinstance(option, Mapping):
        return like.new_tensor(option)
    if len(objectives) != like.shape[1]:
        raise PluginError("an option by objective needs `batch.objectives`, which are not supplied")
    return like.new_tensor([option.get(name, otherwise) for name in objectives])

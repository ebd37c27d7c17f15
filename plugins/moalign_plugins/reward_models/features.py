"""A small network over other scores of a response, learned from pairs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, field_validator

from moalign.api import Batch, ConfigError, DataError, PluginError, RewardModel
from moalign_plugins.reward_models._heads import Positive, of_pairs
from moalign_plugins.reward_models._pairwise import logistic

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "features",
    "class": "Features",
    "summary": "a small network over named scores of a response, logistic loss on the score difference of a pair",
    "paper": "arXiv:2402.15473",
}
Width = Annotated[int, Field(ge=1)]


class Features(RewardModel):
    """-log sigmoid(phi_k(chosen) - phi_k(rejected)), k the objective that judged the pair. arXiv 2402.15473.

    phi_k is a feed-forward network, one for each objective, over the vector of the response's scores for ``features``;
    it reads nothing of the text, and no adapter is trained. Without hidden layers it is logistic regression on the
    differences of the features. An objective that is a feature is not learned: its judgements have loss 0, and it
    scores 0, as one that no pair judged. The features should be of one order of magnitude; a response that lacks one is
    refused. It scores through ``moalign.open_reward_model(...).scores(samples, rewards={...})``, which gives it the
    features; no reward of a sweep does.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "rewards"})
    scores_from_rewards: ClassVar[bool] = True
    """whether ``scores`` reads ``batch.rewards`` too"""

    features: tuple[str, ...] = Field(min_length=1)
    """names of objectives whose scores are the features, larger is better: [faithful, concise, relevant]"""
    hidden: tuple[Width, ...] = (16,)
    """widths of the hidden layers; []: linear"""
    lr: Positive = 1.0
    """the networks' learning rate, in units of the adapter's"""

    @field_validator("features")
    @classmethod
    def _once(cls, features: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in features if features.count(name) > 1})
        if twice:
            raise ValueError(f"'{twice[0]}' stands there twice")
        return features

    @property
    def log_odds(self) -> bool:
        return True

    def check(self, objectives: tuple[str, ...]) -> None:
        unknown = [name for name in self.features if name not in objectives]
        if unknown:
            raise ConfigError(f"reward_model.features: no objective '{unknown[0]}'; there is {', '.join(objectives)}")
        if set(self.features) == set(objectives):
            raise ConfigError("reward_model.features: every objective is a feature, so that none is left to be learned")

    def parameters(self, width: int, objectives: tuple[str, ...], generator: Generator) -> Mapping[str, Tensor]:
        import torch

        found, number = {}, len(objectives)
        for index, (before, after) in enumerate(pairwise((len(self.features), *self.hidden))):
            draws = torch.randn((number, after, before), generator=generator)
            found[f"hidden.{index}.weight"] = draws / before**0.5
            found[f"hidden.{index}.bias"] = torch.zeros(number, after)
        last = (len(self.features), *self.hidden)[-1]
        return {**found, "output.weight": torch.zeros(number, last)}

    def lr_factor(self, name: str) -> float:
        return self.lr

    def loss(self, batch: Batch) -> Tensor:
        features = self.vectors(batch)
        own = features.new_tensor([name not in self.features for name in batch.objectives]).bool()
        learned = own[batch.pair_objective]
        self._check_known(features[batch.pairs[learned].flatten()])
        chosen, rejected = of_pairs(self._phi(features.nan_to_num(0.0), batch), batch)  # NaN: of rows in no such pair
        return logistic(chosen - rejected).where(learned, 0.0)

    def scores(self, batch: Batch) -> Tensor:
        features = self.vectors(batch)
        self._check_known(features)
        return self._phi(features, batch)

    def vectors(self, batch: Batch) -> Tensor:
        """[N,F], NaN where unknown. Raises PluginError where the rewards and their names are not supplied."""
        if batch.rewards is None or not set(self.features) <= set(batch.objectives):
            raise PluginError("the reward model reads scores by name, and `batch` has no such rewards and objectives")
        columns = [batch.objectives.index(name) for name in self.features]
        return batch.rewards[:, columns].to(batch.parameters["output.weight"].dtype)

    def _check_known(self, features: Tensor) -> None:
        lacking = features.isnan().any(0).tolist()
        if any(lacking):
            name = self.features[lacking.index(True)]
            raise DataError(f"a response has no score for '{name}', which is one of the features")

    def _phi(self, features: Tensor, batch: Batch) -> Tensor:
        """[N,M] from [N,F]; the layers hold [M,N,width] in between."""
        from torch.nn.functional import silu

        output = batch.parameters["output.weight"]
        state = features.expand(len(output), *features.shape)
        for index in range(len(self.hidden)):
            weight, bias = (batch.parameters[f"hidden.{index}.{part}"] for part in ("weight", "bias"))
            state = silu(state @ weight.mT + bias[:, None])
        return (state @ output[:, :, None]).squeeze(2).T

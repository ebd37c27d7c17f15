"""A mixture of Bradley-Terry heads with a router on the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, PluginError, RewardModel
from moalign_plugins.reward_models._heads import Positive, final_states, first_weights, of_pairs

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "mixture",
    "class": "Mixture",
    "summary": "several linear heads per objective, mixed by a router on the prompt: judges who disagree",
    "paper": "arXiv:2505.24846",
}


class Mixture(RewardModel):
    """-log P with P(chosen over rejected) = sum over k of f_k(x) sigmoid(r_k(chosen) - r_k(rejected)).

    Each objective has its own components r_k, linear in the final state, and its own router f(x), the softmax of a
    linear function of the state at the prompt's end; a pair's is that of its chosen row. At the start all f_k are
    1/components. The score is sum over k of f_k(x) r_k; P is not the sigmoid of its difference unless there is one
    component, with which this is bradley-terry. ``balance`` adds balance * KL(f || uniform) of each pair's prompt, so
    that the loss of a pair stays its own; a balance of the mean weights over a batch would not.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"final", "context", "pairs"})

    components: int = Field(default=2, ge=1)
    """populations of judges per objective"""
    balance: float = Field(default=0.0, ge=0)
    """weight of the penalty on unequal weights of the components"""
    head_lr: Positive = 1.0
    """the learning rate of heads and router, in units of the adapter's"""

    @property
    def log_odds(self) -> bool:
        return self.components == 1

    def parameters(self, width: int, objectives: tuple[str, ...], generator: Generator) -> Mapping[str, Tensor]:
        import torch

        shape = (self.components, len(objectives), width)
        return {
            "head.weight": first_weights(shape, generator),
            "router.weight": torch.zeros(shape),
            "router.bias": torch.zeros(shape[:2]),
        }

    def lr_factor(self, name: str) -> float:
        return self.head_lr

    def loss(self, batch: Batch) -> Tensor:
        log_weights = self._of_chosen(self.log_weights(batch), batch)
        loss = -(log_weights - self._component_losses(batch)).logsumexp(0)
        if not self.balance:
            return loss
        unequal = (log_weights.exp() * (log_weights + math.log(self.components))).sum(0)
        return loss + self.balance * unequal

    def _component_losses(self, batch: Batch) -> Tensor:
        """-log sigmoid(r_k(chosen) - r_k(rejected)) of each component alone, [K,P]."""
        import torch
        from torch.nn.functional import logsigmoid

        sides = [of_pairs(component, batch) for component in self._component_scores(batch)]
        return -logsigmoid(torch.stack([chosen - rejected for chosen, rejected in sides]))

    def scores(self, batch: Batch) -> Tensor:
        return (self.log_weights(batch).exp() * self._component_scores(batch)).sum(0)

    def head(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        return parameters["head.weight"][0] if self.components == 1 else None

    def log_weights(self, batch: Batch) -> Tensor:
        """log f_k(x) of each row and objective, [K,N,M]."""
        if batch.context is None:
            raise PluginError('the reward model reads the prompt\'s state but does not declare "context" in `needs`')
        weight, bias = batch.parameters["router.weight"], batch.parameters["router.bias"]
        return (batch.context.to(weight.dtype) @ weight.mT + bias[:, None]).log_softmax(0)

    def _component_scores(self, batch: Batch) -> Tensor:
        """[K,N,M]"""
        weights = batch.parameters["head.weight"]
        return final_states(batch, weights) @ weights.mT

    def _of_chosen(self, values: Tensor, batch: Batch) -> Tensor:
        """[K,P] from [K,N,M], under the objective that judged the pair."""
        import torch

        return torch.stack([of_pairs(component, batch)[0] for component in values])

"""The log-ratio of the adapted model to its base as a reward, learned from outcomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, PluginError
from moalign_plugins._outcomes import cross_entropy
from moalign_plugins.reward_models._implicit import Implicit

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "implicit-outcome",
    "class": "ImplicitFromOutcomes",
    "summary": "beta times the log-ratio of the adapted model itself, cross-entropy of right and wrong answers (PRIME)",
    "paper": "arXiv:2502.01456",
}


class ImplicitFromOutcomes(Implicit):
    """-o log sigmoid(r) - (1 - o) log sigmoid(-r), o the response's score: 1 where it is right, 0 where it is wrong.

    r = beta * sum over the response's tokens of q_t, q_t = log pi - log pi_ref, with pi the adapted model and pi_ref
    its base. There is no head, and one objective only. beta q_t are rewards of single tokens, without a label for any
    (arXiv 2502.01456): `token_rewards` of `moalign.open_reward_model`. A response without a score has
    loss 0 and no gradient.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rewards", "logps", "reference"})

    beta: float = Field(default=0.05, gt=0)
    """units of the reward per nat of log-ratio"""

    def loss(self, batch: Batch) -> Tensor:
        if batch.rewards is None:
            raise PluginError('the reward model reads rewards but does not declare "rewards" in `needs`')
        reward = self.scores(batch)[:, 0]
        known = ~batch.rewards[:, 0].isnan()
        outcome = batch.rewards[:, 0].where(known, 0.0).to(reward.dtype)
        return cross_entropy(reward, outcome).where(known, 0.0)

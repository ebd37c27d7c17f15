"""The reward that the adapted model itself stands for, as the forms that learn it from pairs and from outcomes share
it, and the rewards of its single tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.api import Batch, ConfigError, PluginError, RewardModel, log_ratios

if TYPE_CHECKING:
    from torch import Tensor


class Implicit(RewardModel):
    """beta times the log-ratio of the adapted model to its base, summed over the response's tokens.

    ``moalign.open_reward_model(...).token_rewards(samples)`` has the rewards of the single tokens.
    """

    beta: float

    def check(self, objectives: tuple[str, ...]) -> None:
        if len(objectives) != 1:
            names = ", ".join(objectives)
            raise ConfigError(f"objectives: a model's log-ratio is one reward; there are {len(objectives)}: {names}")

    def scores(self, batch: Batch) -> Tensor:
        return self.beta * log_ratios(batch)[:, None]

    def token_rewards(self, batch: Batch) -> Tensor:
        """beta (log pi_t - log pi_ref,t) of each response token, 0 elsewhere; [N,T], whose sum is the score.

        arXiv 2502.01456, where they are called process rewards.
        """
        if batch.ref_logps is None:
            raise PluginError('the reward model reads a reference but does not declare "reference" in `needs`')
        return self.beta * (batch.logps - batch.ref_logps) * batch.mask

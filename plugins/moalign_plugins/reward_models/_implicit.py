"""The reward that the adapted model itself stands for, as the forms that learn it from pairs and from outcomes share
it, and the rewards of its single tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moalign.api import Batch, ConfigError, PluginError, RewardModel, log_ratios

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Implicit(RewardModel):
    """beta times the log-ratio of the adapted model to its base, summed over the response's tokens."""

    beta: float

    def parameters(self, width: int, objectives: tuple[str, ...], generator: Generator) -> Mapping[str, Tensor]:
        if len(objectives) != 1:
            names = ", ".join(objectives)
            raise ConfigError(f"the log-ratio of a model is one reward, and there are {len(objectives)}: {names}")
        return {}

    def scores(self, batch: Batch) -> Tensor:
        return self.beta * log_ratios(batch)[:, None]


def process_rewards(batch: Batch) -> Tensor:
    """q_t = log pi_t - log pi_ref,t of each response token, without beta, 0 elsewhere; [N,T]. arXiv 2502.01456."""
    if batch.ref_logps is None:
        raise PluginError('the reward model reads a reference but does not declare "reference" in `needs`')
    return (batch.logps - batch.ref_logps) * batch.mask


def normalised(process: Tensor) -> Tensor:
    """Divided by the largest size, in the batch, of a sum of a response's rewards from a token to its end; [N,T].

    So no return is beyond 1 in size. All 0 where all are. arXiv 2502.01456.
    """
    to_come = process.flip(1).cumsum(1).flip(1)
    largest = to_come.abs().max()
    return process / largest.where(largest > 0, 1.0)

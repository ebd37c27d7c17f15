"""Likelihood weighted by the exponential of the reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError
from moalign_plugins.objectives._pairs import log_probabilities
from moalign_plugins.objectives._single_responses import advantages_of

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "reward-weighted",
    "class": "RewardWeighted",
    "summary": "likelihood of each response times exp(reward / beta): reward-weighted regression",
    "paper": "arXiv:2302.08582",
}

LARGEST = 80.0  # of an exponent: e^88 is the last that float32 holds, and a step's losses are added up


class RewardWeighted(Objective):
    """-exp(R(y) / beta) log pi(y) of each response, with R the combined reward. arXiv 2302.08582.

    With responses that the reference would give, and ``average: false``, it is smallest at pi_ref exp(R / beta) / Z,
    the policy that E[R] - beta KL(pi || reference) asks for: fitted to the data, so that nothing is said of responses
    that it lacks. As beta grows it becomes the likelihood of all. No value is subtracted (the published configuration
    took one from a head that nothing trained): a constant would change the size of all losses, no optimum.

    The weights are of any size, as exp makes them, and those of a step are not normalised. beta has the reward's units.
    The paper's was 10, for its scores; with rewards from 0 to 1 that is plain likelihood.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups"})
    shiftable: ClassVar[bool] = False

    beta: float = Field(default=1.0, gt=0)
    """price of a nat of KL from those who wrote the responses, in units of the combined reward"""
    average: bool = True
    """mean over the response's tokens; false: their sum"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return weights_of(signal, self.beta)

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return -advantages_of(batch) * log_probabilities(batch, average=self.average)


def weights_of(rewards: Tensor, beta: float) -> Tensor:
    """exp(rewards / beta). Raises PluginError where float32 cannot hold that."""
    exponents = rewards / beta
    most = float(exponents.max()) if len(exponents) else 0.0
    if most > LARGEST:
        raise PluginError(
            f"objective 'reward-weighted': a reward of {most * beta:g} has the weight exp({most:.4g}), which no "
            "float32 holds; raise beta, or scale or shift the rewards with objectives.NAME.transform"
        )
    return exponents.exp()

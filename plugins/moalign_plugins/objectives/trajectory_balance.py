"""Trajectory balance: a response's log-probability regressed on its reward, up to a partition function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError, log_ratios
from moalign_plugins._groups import group_mean

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "trajectory-balance",
    "class": "TrajectoryBalance",
    "summary": "regression of the log-ratio to the reference on the reward and a partition function (MO-GFlowNets)",
    "paper": "arXiv:2210.12765, arXiv:2201.13259, arXiv:2010.10436",
}

MOST_OBJECTIVES = 16  # that the network has room for: it is made before anyone says how many there are
LENIENCE = 1e-6  # on a component of 1, for its rounding


class TrajectoryBalance(Objective):
    """beta^2 (log Z + log pi(y) - log pi_ref(y) - R(y) / beta)^2 of each response, with R the combined reward.

    All of these are 0 at pi = pi_ref exp(R / beta) / Z, the policy that E[R] - beta KL(pi || reference) asks for, and
    only there. It is the loss of multi-objective GFlowNets (arXiv 2210.12765) with the reference in the place of a
    uniform prior: text is written from left to right, so that nothing has to be said of a backward policy, and the
    paper's exponent of the reward is 1 / beta. The factor beta^2 puts it in squared units of the reward, as ``rebel``.

    ``log_z: group`` is the mean of R / beta - log(pi / pi_ref) over the responses to a prompt (arXiv 2010.10436): the
    loss is their variance. With a gradient through the mean or without the step is the same. At the policy that
    sampled, G responses to a prompt have 2 beta^2 (G - 1) / G times the gradient of KL(pi || optimum), on average; but
    the optimum is a fixed point whoever sampled, so that no ratio to an old policy is needed. A prompt of one response
    teaches nothing. Without rollouts the responses are those of the data.

    ``log_z: learned`` has a network of the preference give beta log Z, as in the paper: the gradient is without the
    factor (G - 1) / G, whatever the network says, where the policy sampled. It knows nothing of the prompt. Where log Z
    differs between prompts it learns a mean, and the losses do not come to 0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "reference"})
    shiftable: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    beta: float = Field(default=0.1, gt=0)
    """price of a nat of KL from the reference, in units of the combined reward"""
    log_z: Literal["group", "learned"] = "group"
    """the partition function: from the responses to the prompt, or by a network of the preference"""
    code: Literal["thermometer", "weights"] = "thermometer"
    """what the network reads: each component as ``bins`` numbers that fill up one after the other, or as it is"""
    bins: int = Field(default=50, ge=1)
    """numbers in the code of a component"""
    width: int = Field(default=64, ge=1)
    """units in the network's one layer"""
    log_z_lr: float = Field(default=10.0, gt=0)
    """the network's learning rate, in units of the adapter's"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return signal.clone()

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        if batch.advantages is None:
            raise PluginError('the loss reads advantages but does not declare "groups" in `needs`')
        residual = self.beta * log_ratios(batch) - batch.advantages
        if self.log_z == "group":
            return (residual - group_mean(residual, batch.groups)) ** 2
        return (residual + self.value(batch.preference.to(residual), batch.parameters)) ** 2

    def parameters(self, width: int, generator: Generator) -> Mapping[str, Tensor]:
        import torch

        if self.log_z == "group":
            return {}
        columns = self.bins if self.code == "thermometer" else 1
        first = torch.randn(MOST_OBJECTIVES, columns, self.width, generator=generator) / columns**0.5
        return {
            "log_z.first": first,
            "log_z.first_bias": torch.zeros(self.width),
            "log_z.second": torch.zeros(self.width),
            "log_z.second_bias": torch.zeros(1),
        }

    def lr_factor(self, name: str) -> float:
        return self.log_z_lr

    def value(self, preference: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """beta log Z of each preference, [N,M] -> [N]; 0 before any training."""
        import torch

        objectives = preference.shape[1]
        if objectives > MOST_OBJECTIVES:
            raise PluginError(
                f"objective 'trajectory-balance', log_z: learned: the network has room for {MOST_OBJECTIVES} "
                f"objectives, there are {objectives}; use log_z: group"
            )
        if not bool((preference.abs() <= 1 + LENIENCE).all()):
            raise PluginError(
                "objective 'trajectory-balance', log_z: learned: the network reads weights or a direction, whose "
                "components are from -1 to 1, and no thresholds; use log_z: group"
            )
        coded = thermometer(preference, self.bins) if self.code == "thermometer" else preference[..., None]
        inner = torch.einsum("nmc,mcw->nw", coded, parameters["log_z.first"][:objectives])
        inner = (inner + parameters["log_z.first_bias"]).tanh()
        return inner @ parameters["log_z.second"] + parameters["log_z.second_bias"]


def thermometer(values: Tensor, bins: int) -> Tensor:
    """[...] from -1 to 1 -> [...,bins]: of equal parts of the way from 0 to 1, how much of each lies below the size of
    the value, with its sign. The parts sum to ``bins`` times the value, so that no two values have one code."""
    import torch

    parts = torch.arange(bins, dtype=values.dtype, device=values.device)
    return values.sign()[..., None] * (values.abs()[..., None] * bins - parts).clamp(0, 1)

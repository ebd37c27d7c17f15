"""REINFORCE with the mean of the other responses as baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign_plugins._groups import leave_one_out
from moalign_plugins.objectives._policy_gradient import PolicyGradient

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "rloo",
    "class": "RLOO",
    "summary": "policy gradient on sampled responses, with the mean of the others to the same prompt as baseline",
    "paper": "arXiv:2402.14740",
}


class RLOO(PolicyGradient):
    """The advantage is r_i - mean of r_j over j != i, which is G / (G - 1) (r_i - mean). arXiv 2402.14740.

    The baseline does not depend on the response, so that the gradient is unbiased. A prompt with one response has none:
    its advantage is 0.
    """

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return leave_one_out(self.shaped(signal, log_ratios), groups)

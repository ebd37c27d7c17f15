"""REINFORCE with the greedy response as baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.api import PluginError
from moalign_plugins.objectives._policy_gradient import PolicyGradient

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "remax",
    "class": "ReMax",
    "summary": "policy gradient on sampled responses, with the greedy response to the same prompt as baseline",
    "paper": "arXiv:2310.10505",
}


class ReMax(PolicyGradient):
    """The advantage is r(y) - r(y*), y* the response whose every token is the policy's likeliest. arXiv 2310.10505.

    y* does not depend on what was sampled, so that the gradient is unbiased, and a prompt with one response has a
    baseline too. With ``kl`` "reward" the price is that of the whole response y (the published code takes each token's
    own); the baseline is without it, which any function of the prompt may be. Nothing is clipped, and no mean is taken
    over the tokens of a batch.
    """

    needs: ClassVar[frozenset[str]] = PolicyGradient.needs | {"greedy"}

    def advantages(
        self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None, greedy: Tensor | None = None
    ) -> Tensor:
        if greedy is None:
            raise PluginError('the loss reads the greedy response but does not declare "greedy" in `needs`')
        return self.shaped(signal, log_ratios) - greedy

"""A policy gradient that pays for the chi-squared divergence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from moalign.api import PluginError
from moalign_plugins._groups import leave_one_out
from moalign_plugins.objectives._policy_gradient import PolicyGradient

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "chi-squared",
    "class": "ChiSquared",
    "summary": "policy gradient held by a chi-squared divergence, for rewards that only correlate with what is meant",
    "paper": "arXiv:2403.03185",
}


class ChiSquared(PolicyGradient):
    """Ascent on E[signal] - lam sqrt(chi2(pi || ref)), or on E[signal] - lam chi2, less beta KL.

    arXiv 2403.03185. chi2 = E_pi[L] - 1 with L = pi / ref of whole responses. Its gradient is 2 E[L grad log pi], so
    a response counts signal - 2 lam L, and with the square root signal - lam L / sqrt(chi2), before the baseline,
    which is that of ``rloo``. A reward whose correlation with the wanted one is rho under the reference promises a
    gain of at least rho times its own less sqrt(1 - rho^2) sqrt(chi2), both in standard deviations
    (``moalign.diagnostics.proxies``): lam = sqrt(1 - rho^2) / rho times the signal's deviation climbs that bound. KL
    does not bound what rare responses with an enormous reward can do; chi2 does.

    chi2 is that of the round's own responses. As in the authors' code its root is taken of a mean without the largest
    hundredth, and where that is not above 0, as in the first round, the square root has no slope and nothing is paid.
    """

    beta: float = Field(default=0.0, ge=0)
    """price of a nat of KL from the reference beside it, in units of the combined reward"""
    lam: float = Field(default=0.1, gt=0)
    """price of the divergence, in units of the combined reward"""
    of: Literal["root", "square"] = "root"
    """what is paid for: sqrt(chi2), as the bound has it; or chi2"""
    longest: float = Field(default=10.0, gt=0, le=300)
    """log-ratios of responses above this count as this, so that no single response is the whole of the divergence"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        if log_ratios is None:
            raise PluginError('the loss reads log-ratios but does not declare "reference" in `needs`')
        return leave_one_out(self.shaped(signal, log_ratios) - self.price(log_ratios), groups)

    def price(self, log_ratios: Tensor) -> Tensor:
        """What each response pays, [N]: lam times the slope of the divergence."""
        ratios = log_ratios.clamp(max=self.longest).exp()
        if self.of == "square":
            return 2 * self.lam * ratios
        chi2 = float(without_largest(ratios).mean()) - 1
        return self.lam * ratios / chi2**0.5 if chi2 > 0 else ratios.new_zeros(len(ratios))


def without_largest(values: Tensor) -> Tensor:
    """[N] -> all but the largest hundredth, rounded down."""
    return values.sort().values[: len(values) - len(values) // 100]

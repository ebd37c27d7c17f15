"""Anchored direct preference optimisation: a policy's choice among the responses to a prompt, against a target."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError
from moalign_plugins._groups import group_log_softmax
from moalign_plugins.objectives._listwise import cross_entropy
from moalign_plugins.objectives._pairs import lengths
from moalign_plugins.objectives._single_responses import advantages_of

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "adpo",
    "class": "ADPO",
    "summary": "cross entropy of a softmax over log-ratios of all responses to a prompt, from one over their rewards",
    "paper": "arXiv:2510.18913",
}


class ADPO(Objective):
    """-G q_i log softmax(u)_i of each of the G responses to a prompt, u_i = (log pi - log pi_anchor)(y_i) / tau.

    q is softmax(R / (beta tau)) over them, with R the combined reward; so pi_anchor exp(R / beta) / Z makes u and
    R / (beta tau) agree up to a constant, whoever wrote the responses: with the reference as anchor that is the policy
    that E[R] - beta KL(pi || reference) asks for. arXiv 2510.18913, where R / (beta tau) is written R / beta_r with
    beta_r = beta tau. ``target: best`` is q = 1 for the best alone (the earliest of equals): with two responses to a
    prompt that is DPO with beta = 1 / tau.

    ``anchor: sampler`` compares with the policy that sampled the round, which needs rollouts: each round then moves the
    policy by R / beta from where it was, and no longer to one optimum. The author's code also bounds u and the
    log-ratios, standardises R in the group and defaults to means over tokens; none of it is done here. A prompt of one
    response teaches nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups"})
    shiftable: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    beta: float = Field(default=0.1, gt=0)
    """price of a nat of KL from the anchor, in units of the combined reward"""
    tau: float = Field(default=1.0, gt=0)
    """temperature of the policy's choice: a larger one makes the loss of a difference in log-ratio smaller"""
    target: Literal["softmax", "best"] = "softmax"
    """what the choice is to be: soft, by the rewards; or the best response"""
    anchor: Literal["reference", "sampler"] = "reference"
    """what log-ratios are to: the reference, or the policy that sampled the responses"""
    average: bool = False
    """mean over the response's tokens; false: their sum, as the optimum asks for"""

    @property
    def wants(self) -> frozenset[str]:
        return self.needs | {"reference" if self.anchor == "reference" else "old_logps"}

    def kl_price(self) -> float:
        return super().kl_price() if self.target == "softmax" else 0.0  # else beta is not read

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        if self.target == "softmax":
            return group_log_softmax(signal / (self.beta * self.tau), groups).exp()
        found = signal.new_zeros(len(signal))
        for group in groups.unique():
            rows = (groups == group).nonzero().squeeze(1)
            found[rows[signal[rows].argsort(descending=True, stable=True)[0]]] = 1
        return found

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        anchor = batch.ref_logps if self.anchor == "reference" else batch.old_logps
        if anchor is None:
            raise PluginError(f"objective 'adpo': the batch has no log-probabilities of the anchor '{self.anchor}'")
        ratios = ((batch.logps - anchor) * batch.mask).sum(-1)
        if self.average:
            ratios = ratios / lengths(batch)
        return cross_entropy(ratios / self.tau, advantages_of(batch), batch.groups)

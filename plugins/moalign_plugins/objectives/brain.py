"""Distribution matching by importance weights among the responses to a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError
from moalign_plugins._groups import group_log_softmax
from moalign_plugins.objectives._listwise import cross_entropy
from moalign_plugins.objectives._single_responses import advantages_of

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "brain",
    "class": "BRAIn",
    "summary": "self-normalised importance weights of the KL-optimal policy, matched by the policy's own",
    "paper": "arXiv:2402.02479",
}


class BRAIn(Objective):
    """-G alpha_i log b_i of each of the G responses to a prompt, alpha and b importance weights that sum to 1 there.

    With p* = pi_ref exp(R / beta) / Z, R the combined reward, and q' who wrote the responses: alpha is proportional to
    p* / q', and b to pi / q'. Unverified against the paper (arXiv 2402.02479), whose text we could not read: what is
    tested is that the gradient is that of -sum_i (alpha_i - b_i) log pi(y_i) with the weights held fixed, of which b_i
    is the self-normalised baseline; that it is 0 at p*; and that it is that of ``adpo`` with the anchor q', tau 1 and
    the target alpha.

    ``proposal: reference`` takes the responses for the reference's own, as those of a file and of the first round are:
    alpha is softmax(R / beta). ``sampler`` is the policy that sampled the round, which needs rollouts, and which the
    rounds of the paper ask for: the base is the reference, and the previous iterate the proposal. Where the reference
    is the previous iterate as well, the two are one. The default beta is ours.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "reference"})
    shiftable: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    beta: float = Field(default=0.1, gt=0)
    """price of a nat of KL from the reference, in units of the combined reward"""
    proposal: Literal["reference", "sampler"] = "reference"
    """who wrote the responses: the reference, or the policy that sampled the round"""

    @property
    def wants(self) -> frozenset[str]:
        return self.needs | ({"old_logps"} if self.proposal == "sampler" else set())

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        exponents = signal / self.beta
        if self.proposal == "sampler":
            if log_ratios is None:
                raise PluginError('the loss reads log-ratios but does not declare "reference" in `needs`')
            exponents = exponents - log_ratios
        return group_log_softmax(exponents, groups).exp()

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        written = batch.ref_logps if self.proposal == "reference" else batch.old_logps
        if written is None:
            raise PluginError(f"objective 'brain': the batch has no log-probabilities of the {self.proposal}")
        ratios = ((batch.logps - written) * batch.mask).sum(-1)
        return cross_entropy(ratios, advantages_of(batch), batch.groups)

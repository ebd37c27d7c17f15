"""Order-preserving flow networks as a loss on lists: probability for the responses that none beats in everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from moalign.api import Batch, Objective, PairTerms, PluginError, log_ratios
from moalign_plugins.objectives._listwise import cross_entropy
from moalign_plugins.objectives._pairs import log_probabilities
from moalign_plugins.objectives._single_responses import advantages_of

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "order-preserving",
    "class": "OrderPreserving",
    "summary": "equal probability for the non-dominated responses to a prompt, none for the others (OP-GFN)",
    "paper": "arXiv:2310.00386",
}


class OrderPreserving(Objective):
    """-G t_i log softmax(h)_i of each of the G responses to a prompt, with h = log pi(y) and t equal shares, which sum
    to 1, for the responses that no other one to the prompt dominates, and 0 for those that one does.

    One response dominates another that is as good for every objective and better for one. Only the order of rewards
    counts: a monotone map of an objective's changes nothing. arXiv 2310.00386, whose h is the learned log-reward of a
    flow network, log Z + log P_F - log P_B; text is written from left to right, so that log P_B is 0, and log Z falls
    out of the softmax. Its set is the batch, with a replay of the best; here it is the responses to a prompt.

    ``relative: true`` has h = log pi - log pi_ref: what stays of the reference where only the non-dominated responses
    are left, with the proportions that it gives them.

    The weights of a preference say which objectives count, and not how much: one of weight 0 does not, and with a
    negative component less is better. A front needs a search whose preferences differ in that, or ``condition``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "rewards"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"relative": frozenset({"reference"})}
    shiftable: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    relative: bool = False
    """whether probabilities are relative to the reference's"""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return signal * 0 + 1  # every response counts; which ones are good the loss sees by the rewards

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        if batch.rewards is None:
            raise PluginError('the loss reads rewards but does not declare "rewards" in `needs`')
        values = log_ratios(batch) if self.relative else log_probabilities(batch, average=False)
        targets = shares(batch.rewards, batch.preference.to(batch.rewards), batch.groups)
        return cross_entropy(values, advantages_of(batch) * targets, batch.groups)


def shares(rewards: Tensor, preference: Tensor, groups: Tensor) -> Tensor:
    """Equal shares for the non-dominated responses to each prompt, 0 for others; rewards and preference [N,M] -> [N].

    Raises PluginError for thresholds, and where a reward that counts is unknown.
    """
    if bool(preference.isnan().any()):
        raise PluginError("objective 'order-preserving' knows weights and directions, no thresholds")
    values = (rewards * preference.sign()).where(preference != 0, 0.0)
    if bool(values.isnan().any()):
        raise PluginError("objective 'order-preserving': a reward of a response is unknown (NaN)")
    together = groups[:, None] == groups
    as_good = (values[:, None] >= values).all(-1)  # [i, j]: i is as good as j for every objective
    dominated = (together & as_good & ~as_good.T).any(0)
    label = (~dominated).to(values)
    return label / (together * label).sum(1)

"""Weights that learn what the policy should be rewarded for, so that one designated objective is content with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from moalign.api import Combiner, PluginError, Preference, Round
from moalign_plugins.combiners._hypergradient import (
    OuterLoss,
    disagreement,
    hypergradient,
    lost_return,
    without_repetition,
)
from moalign_plugins.combiners._preferences import needs_objectives, needs_weights
from moalign_plugins.combiners._scalarised import weighted_sum
from moalign_plugins.combiners._simplex import ascended, floored

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "learned-weights",
    "class": "LearnedWeights",
    "summary": "weighted sum whose weights learn, by a hypergradient, what makes a policy that one objective likes",
    "paper": "arXiv:2308.02585",
}


class LearnedWeights(Combiner):
    """sum_k w_k r_k, where each round w <- softmax(log w - rate dF/dw): bilevel learning of the weights of rewards.

    The policy follows the weights, y*(w) = argmax E_y[w . r] - beta KL(y || ref), and F(w) = f(w, y*(w)) is what the
    objective ``outer`` thinks of it. ``return``: f = -E_y[r_outer], as BARFI has it (arXiv 2310.19007). ``preference``:
    f = E_{a,b ~ y}[-log sigmoid(s (w . r(a) - w . r(b)) / tau)], s the sign of r_outer(a) - r_outer(b), as in PARL
    (arXiv 2308.02585): the sum is to rank the policy's own responses as ``outer`` does. Ties count 0, so that a policy
    whose responses tie loses nothing.

    The hypergradient is that of the penalty method (arXiv 2309.01753), df/dw - (E_{y_sigma}[r] - E_{y*}[r]) / sigma;
    y_sigma minimises sigma f + g, g the inner problem. A round's responses stand for y*, and for y_sigma with weights
    exp(-sigma f'(a) / beta) / Z within each prompt, f' the functional derivative of f at y*, where df/dw is taken too
    (in the paper at y_sigma). As sigma -> 0, ``return`` has dF/dw_k = -Cov(r_outer, r_k) / beta. In that limit
    estimates are unbiased: covariances have the divisor G - 1, for ``preference`` G - 2. Unverified: what is said of
    the papers is from memory. BARFI solves for an implicit gradient by a Neumann series and learns a discount beside;
    in PARL many parameters of a reward are learned, here the weights of a sum.

    The preference is where learning begins. An objective without weight keeps none: ``outer`` may have 0 and only
    judge, or take part in the sum like the others. F is not convex, and where learning ends can depend on its
    beginning. A round's policy is not yet the optimum for its weights; a small ``rate`` lets it follow. Rewards are
    seen before any transform. A loss that standardises advantages, or prices the KL otherwise, has another optimum
    than y*.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})

    outer: str
    """the objective that judges the policy which the weights lead to"""
    loss: Literal["return", "preference"] = "return"
    """what judges the policy: its mean reward by ``outer``, or how well the weighted sum ranks its responses"""
    beta: float = Field(gt=0)
    """the price of a nat of KL in units of the signal, as the loss has it (``loss.beta``)"""
    sigma: float = Field(default=0.01, gt=0)
    """how much of the outer loss is mixed into the inner one; the hypergradient errs in proportion"""
    tau: float = Field(default=1.0, gt=0)
    """of ``preference``: the difference of weighted sums that counts as one, in their unit"""
    rate: float = Field(default=0.1, gt=0)
    """by how much the logarithm of a weight moves for a hypergradient of 1, per round"""
    floor: float = Field(default=0.1, ge=0, lt=1)
    """the share of its first weight that every weight keeps; 0: one objective may take all"""

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "learned-weights")
        needs_objectives([self.outer], preference, "learned-weights", "outer")

    def init(self, preference: Preference) -> Mapping[str, Any]:
        first = dict(preference.values)
        return {"objectives": list(first), "first": list(first.values()), "weights": first}

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        weights, first = self._weights(state, seen.start), seen.start.new_tensor(state["first"])
        counts, loss, slopes = first > 0, seen.start.new_zeros(()), weights * 0
        prompts = list(self._prompts(seen))
        for rewards in prompts:
            y = rewards.new_full((len(rewards),), 1 / len(rewards))
            outer = self._outer_loss(y, rewards, weights, state["objectives"].index(self.outer))
            loss = loss + outer.value / len(prompts)
            slopes = slopes + hypergradient(y, rewards, outer, self.beta, self.sigma, draws=True) / len(prompts)
        moved = weights.clone()
        moved[counts] = floored(ascended(weights[counts], -slopes[counts], self.rate), self.floor * first[counts])
        named = dict(zip(state["objectives"], moved.tolist(), strict=True))
        return {**state, "weights": named, "outer_loss": float(loss)}

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return weighted_sum(rewards, self._weights(state, rewards))

    def _weights(self, state: Mapping[str, Any], like: Tensor) -> Tensor:
        return like.new_tensor([state["weights"][name] for name in state["objectives"]])

    def _outer_loss(self, y: Tensor, rewards: Tensor, weights: Tensor, column: int) -> OuterLoss:
        judged = rewards[:, column]
        if self.loss == "return":
            return lost_return(y, rewards, judged)
        return disagreement(without_repetition(y), rewards, judged, weights, self.tau)

    def _prompts(self, seen: Round) -> Iterator[Tensor]:
        """The rewards [G,M] of each prompt with so many responses that they say something. Raises PluginError if none
        has."""
        least = 2 if self.loss == "return" else 3
        groups, sizes = seen.groups.unique(return_counts=True)
        if int(sizes.max()) < least:
            raise PluginError(
                f"combiner 'learned-weights' with loss '{self.loss}' learns from {least} or more responses to a "
                f"prompt, and no prompt of the round has more than {int(sizes.max())}; set rollouts.samples to "
                f"{least} or more"
            )
        yield from (seen.rewards[seen.groups == group] for group in groups[sizes >= least])

"""Rules that weigh the objectives by the inner products of their gradients, anew in every round or step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from moalign.api import Batch, Combiner, PairTerms, PluginError, Preference, Round, StepLosses
from moalign_plugins.combiners._judged import plain_terms
from moalign_plugins.combiners._preferences import needs_weights
from moalign_plugins.combiners._scalarised import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

NO_GRADIENT = 1e-6  # times the longest: what is shorter is rounding and has no direction


class OverGradients(Combiner):
    """The signal is sum_k c_k r_k; c follows from the Gram matrix of the gradients of the same round.

    g_k is the gradient of the loss that objective k alone has, of the responses that c then weighs: no round is spent.
    The matrix is the same for descent on losses and ascent on rewards. A subclass says how the preference scales the
    gradients (``scales``) and which combination of the scaled ones it wants (``shares``); c_k is the share times the
    scale, so that sum_k c_k g_k is that combination. Objectives without weight take no part. Where all gradients are 0
    there is nothing to combine, and c is the preference.

    The combination is what training follows where advantages are linear in the signal ("reinforce", "rloo", "grpo"
    without ``standardise``) and, with the KL in the reward, where c sums to 1: each g_k has paid for the KL once.

    On labelled pairs g_k is the gradient of L_k, the mean loss of the step's pairs that objective k judged, and the
    step follows sum_k c_k g_k exactly, the matrix being that of the very step; but of so few pairs a gradient is noisy,
    and what harms nobody on them may harm on the others. Where the gradients combine to 0 the step is 0. An objective
    that judged none of a step's pairs takes no part in it. Objectives count alike however many pairs each judged,
    unlike under "linear".
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"labelled", "groups"})
    needs_gram: ClassVar[bool] = True
    weighs_losses: ClassVar[bool] = True
    weighs_judges: ClassVar[bool] = True
    called: ClassVar[str]
    requires: ClassVar[Mapping[str, str]] = {"torchjd": "moalign[torchjd]"}

    normalise: bool = False
    """bring every gradient to length 1 first, so that the unit of a reward does not matter; an objective without a
    gradient in a round then has no weight in it"""
    sum_to_one: bool = True
    """divide the weights of a round or step by their sum, so that the signal stays in the rewards' unit, in which the
    loss prices the KL; weights that are all 0 stay so"""

    def init(self, preference: Preference) -> Mapping[str, Any]:
        first = dict(preference.values)
        return {"objectives": list(first), "preference": list(first.values()), "weights": first}

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        names, preference = state["objectives"], seen.start.new_tensor(state["preference"])
        # in the order of their names: a solver's last digits depend on the order
        counts = [place for place in sorted(range(len(names)), key=names.__getitem__) if preference[place] > 0]
        found = preference.clone()
        found[counts] = self.combined(wanted_products(seen.gram, seen.start, counts), preference[counts])
        return {**state, "weights": dict(zip(names, found.tolist(), strict=True))}

    def check(self, preference: Preference) -> None:
        needs_weights(preference, self.called)

    def pair_terms(self, batch: Batch) -> PairTerms:
        return plain_terms(batch, self.called)

    def observe_losses(self, state: Mapping[str, Any], seen: StepLosses) -> Mapping[str, Any]:
        names, preference, judged = list(seen.objectives), seen.preference, seen.pairs > 0
        counts = [place for place in sorted(range(len(names)), key=names.__getitem__) if preference[place] > 0]
        counts = [place for place in counts if bool(judged[place])]
        found = preference * 0
        if counts:
            found[counts] = self.combined(wanted_products(seen.gram, preference, counts), preference[counts])
        return {**state, "weights": dict(zip(names, found.tolist(), strict=True))}

    def loss_weights(self, state: Mapping[str, Any]) -> Mapping[str, float]:
        weights: Mapping[str, float] = state["weights"]
        return weights

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return weighted_sum(rewards, rewards.new_tensor([state["weights"][name] for name in state["objectives"]]))

    def combined(self, gram: Tensor, preference: Tensor) -> Tensor:
        """c of the objectives that count: inner products [K,K] and their weights, all above 0, [K] -> [K]."""
        lengths = gram.diagonal().clamp(min=0).sqrt()
        if not bool(lengths.any()):
            return preference
        takes_part = lengths > NO_GRADIENT * lengths.max() if self.normalise else lengths >= 0
        scales = self.scales(preference[takes_part])
        if self.normalise:
            scales = scales / lengths[takes_part]
        scaled = scales[:, None] * gram[takes_part][:, takes_part] * scales
        found = preference * 0
        # in units of all their lengths, because the solvers have absolute tolerances, by which a share may be below 0
        found[takes_part] = (self.shares(scaled / scaled.trace()) * scales).clamp(min=0)
        total = found.sum()
        return found / total if self.sum_to_one and bool(total > 0) else found

    def scales(self, preference: Tensor) -> Tensor:
        """What each gradient is multiplied by before they are combined; [K] -> [K]."""
        return preference

    def shares(self, gram: Tensor) -> Tensor:
        """How much of each scaled gradient the combination has, from their inner products of trace 1; [K,K] -> [K]."""
        raise NotImplementedError


def wanted_products(gram: Tensor | None, like: Tensor, counts: Tensor | list[int]) -> Tensor:
    """The inner products among the objectives that count, of the kind of ``like`` [M]. Raises PluginError where they
    are missing or not finite."""
    size = len(like)
    if gram is None:
        raise PluginError("the weights follow the objectives' gradients, and nobody has measured their inner products")
    if gram.shape != (size, size) or not bool(gram.isfinite().all()):
        raise PluginError(f"the inner products of the gradients must be [{size},{size}] and finite")
    return gram.to(like)[counts][:, counts]

"""Rules that are a function of the objectives' losses on labelled pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Batch, Combiner, PairTerms, StepLosses
from moalign_plugins.combiners._judged import is_labelled, plain_terms

if TYPE_CHECKING:
    from torch import Tensor


class OverLosses(Combiner):
    """On labelled pairs U(L_1, ..., L_M) is minimised, L_k the mean loss of the pairs that objective k judged.

    A step follows sum_k c_k grad L_k with c_k = dU/dL_k at the losses of that very step: the exact gradient of U of the
    step's mean losses. (U of the mean over all pairs it is only on average, and for a U that is not linear not even so:
    the U of a few pairs' losses is no unbiased estimate.) With ``memory`` the weights are those at a running mean over
    the steps, which has less noise and lags behind; the direction is then the gradient of U at other losses.

    Of an objective that judged no pair of a step nothing is known in it, so that U is that of the others. Unlike under
    "linear", objectives count alike however many of the pairs each of them judged. Subclasses say what U is.
    """

    weighs_losses: ClassVar[bool] = True
    weighs_judges: ClassVar[bool] = True
    called: ClassVar[str]

    memory: float = Field(default=0.0, ge=0, lt=1)
    """on labelled pairs: how much of an objective's mean over earlier steps stays in each new one; 0: the weights are
    those at the step's own losses"""

    def total_loss(self, losses: Tensor, preference: Tensor, names: list[str]) -> Tensor:
        """U [] of losses [K] of the objectives with weight that judged a pair, whose weights are above 0, [K]."""
        raise NotImplementedError

    def pair_terms(self, batch: Batch) -> PairTerms:
        return plain_terms(batch, self.called) if is_labelled(batch) else super().pair_terms(batch)

    def observe_losses(self, state: Mapping[str, Any], seen: StepLosses) -> Mapping[str, Any]:
        import torch

        known = dict(state.get("losses", {}))
        judged = [place for place, count in enumerate(seen.pairs.tolist()) if count and seen.preference[place] > 0]
        for place in judged:
            name, loss = seen.objectives[place], float(seen.losses[place])
            known[name] = self.memory * known[name] + (1 - self.memory) * loss if name in known else loss
        names = [seen.objectives[place] for place in judged]
        found = dict.fromkeys(seen.objectives, 0.0)
        if names:
            with torch.enable_grad():
                losses = seen.losses.new_tensor([known[name] for name in names]).requires_grad_()
                (slopes,) = torch.autograd.grad(self.total_loss(losses, seen.preference[judged], names), losses)
            found |= dict(zip(names, slopes.tolist(), strict=True))
        return {**state, "losses": known, "weights": found}

    def loss_weights(self, state: Mapping[str, Any]) -> Mapping[str, float]:
        weights: Mapping[str, float] = state["weights"]
        return weights

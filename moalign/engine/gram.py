"""Inner products of the objectives' gradients on one adapter, from one forward and one backward pass.

The loss of a sampled response is its advantage times a loss of its own, so that the gradient of objective k is the sum
over responses of advantage_k times one and the same gradient. In a backward pass of the sum of those losses each layer
sees the positions of every response apart; weighing them by the advantages under each objective gives all gradients of
that layer, and their inner products are added up layer after layer. arXiv 2509.11452 does with M passes what needs one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign import door, lora
from moalign.api import Objective
from moalign.batch import Batch, PairTerms
from moalign.data.dataset import PairDataset
from moalign.engine.model import LanguageModel
from moalign.engine.tokens import batch_of, shared
from moalign.lora import Mixture

POSITIONS = 2**14  # in a pass, padding among them


class Products:
    """``total`` [M,M]: the products so far. ``weights`` [M,n]: of the positions of the pass under way."""

    def __init__(self, objectives: int, device: torch.device):
        self.gradients: dict[int, Tensor] = {}
        self.weights = torch.empty(objectives, 0, device=device)
        self._called = 0

    def begin(self, weights: Tensor) -> None:
        self.weights, self._called = weights, 0

    def __call__(self, left: Tensor, right: Tensor) -> None:
        """Layers call in the same order in every pass, and their gradients are sums over passes."""
        weighed = left.detach() * self.weights[:, :, None].to(left.dtype)
        gradient = (weighed.mT @ right).flatten(1)
        known = self.gradients.get(self._called)
        self.gradients[self._called] = gradient if known is None else known + gradient
        self._called += 1

    def total(self) -> Tensor:
        found = [gradient.double() @ gradient.double().t() for gradient in self.gradients.values()]
        return torch.stack(found).sum(0)


def gradient_products(
    model: LanguageModel,
    slot: str,
    objective: Objective,
    dataset: PairDataset,
    advantages: NDArray[np.float64],
    candidate: str = "",
    preference: Sequence[float] = (),
    parameters: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """G[M,M] with G[j,k] = <g_j, g_k>, float64, g_k the gradient of the mean loss with the advantages [M,P] under k.

    ``dataset``: responses that are units of their own. The part of the loss that does not depend on the advantages
    has no place in it. At the policy that sampled the responses, where no ratio is clipped. ``preference`` and
    ``parameters`` are the candidate's, as the loss finds them in its batch.
    """
    products = Products(len(advantages), model.device)
    rows = dataset.pairs[:, 0]
    longest = max(len(dataset.sequences[row].ids) for row in rows)
    per_pass = max(1, POSITIONS // longest)
    for start in range(0, len(rows), per_pass):
        chosen = rows[start : start + per_pass]
        layout = model.lay_out([dataset.sequences[row] for row in chosen], [[place] for place in range(len(chosen))])
        per_row = torch.from_numpy(advantages[:, start : start + per_pass] / len(rows)).to(model.device)
        products.begin(per_row.repeat_interleave(layout.input_ids.shape[1], dim=1))
        with torch.enable_grad(), lora.mixed(model.policy, Mixture((slot,), (len(chosen),), tap=products)):
            wanted = "entropy" in objective.wants
            scored = model.scores_of(model.response_states(layout), layout, entropy=wanted)
            own = shared(len(chosen), scored.logps, preference, parameters)
            batch = batch_of(dataset, chosen, layout, scored.logps, **own)
            if scored.entropy is not None:  # a bonus does not depend on the advantages
                batch = replace(batch, entropy=scored.entropy.detach())
            _unit_loss(objective, batch, candidate).backward()
    return products.total().cpu()


def _unit_loss(objective: Objective, batch: Batch, candidate: str) -> Tensor:
    """The sum over rows of what an advantage of 1 adds to the loss."""
    one = torch.ones_like(batch.logps[:, 0])
    counted, without = (
        door.call(
            objective, "loss", replace(batch, advantages=value), PairTerms.of_rows(batch.logps), candidate=candidate
        )
        for value in (one, one * 0)
    )
    return (counted - without).sum()

"""Gradients of the objectives' losses on labelled pairs at one adapter, one pass over its own pairs for each objective.

Where ``gram`` gets all inner products from one backward pass, because the loss of a sampled response is its advantage
times a loss of its own, a loss on pairs has no such factor, and each objective judges pairs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign import door, lora
from moalign.api import Objective
from moalign.batch import Batch, PairTerms
from moalign.data.batching import collate
from moalign.data.dataset import PairDataset
from moalign.engine.model import LanguageModel
from moalign.engine.passes import PairPass, pair_passes
from moalign.lora import Mixture, Stack

SUPPLIED = frozenset({"pairs", "margins", "reference", "entropy"})  # what a loss may need here


def pairs_of(dataset: PairDataset, objective: int, scored: bool) -> NDArray[np.int64]:
    """The pairs that count for an objective (an index): those that it judged; where the loss learns from reward
    differences (``scored``), all whose two responses have its reward."""
    if not scored:
        return np.flatnonzero(dataset.pair_objective == objective)
    return np.flatnonzero(np.isfinite(dataset.rewards[dataset.pairs, objective]).all(1))


def pair_gradient_products(
    model: LanguageModel,
    stack: Stack,
    slot: str,
    objective: Objective,
    dataset: PairDataset,
    candidate: str = "",
) -> Tensor:
    """G[M,M] with G[j,k] = <g_j, g_k>, float64 on the CPU, g_k the gradient of the mean loss over the pairs of
    objective k, with respect to all that is trained of the slot. NaN in row and column of one without pairs.

    The loss is the objective's own for k alone: scale and weight 1, margin 0, and of reward differences that of k. Its
    reference is the untouched base.
    ``stack``: of which the slot is one; its gradients are zero before and after.
    """
    found: list[Tensor | None] = []
    for index in range(len(dataset.objectives)):
        pairs = pairs_of(dataset, index, "margins" in objective.wants)
        if len(pairs):
            found.append(gradient(model, stack, slot, objective, dataset, pairs, index, candidate))
        else:
            found.append(None)
    size = sum(parameter.numel() for parameter in stack.parameters[slot])
    missing = torch.full((size,), torch.nan, dtype=torch.float64)
    table = torch.stack([missing if each is None else each for each in found])
    return table @ table.t()


def gradient(
    model: LanguageModel,
    stack: Stack,
    slot: str,
    objective: Objective,
    dataset: PairDataset,
    pairs: NDArray[np.int64],
    index: int,
    candidate: str = "",
) -> Tensor:
    """[P] float64 on the CPU: of the mean loss over these pairs (indices), for objective ``index``."""
    trained = stack.parameters[slot]
    try:
        for part in pair_passes(dataset, pairs, model.packing):
            layout = model.lay_out([dataset.sequences[row] for row in part.sequences], part.rows)
            reference = _reference(model, layout) if "reference" in objective.wants else None
            mixture = Mixture((slot,), (len(part.rows),))
            with torch.enable_grad(), lora.mixed(model.policy, mixture):
                wanted = "entropy" in objective.wants
                scored = model.scores_of(model.response_states(layout), layout, entropy=wanted)
                batch, terms = _batch(dataset, part, layout, index, scored, reference)
                losses = door.call(objective, "loss", batch, terms, candidate=candidate)
                (losses.sum() / len(pairs)).backward()
        return torch.cat([_of(parameter).flatten() for parameter in trained]).double().cpu()
    finally:
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad.zero_()


def _of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _reference(model: LanguageModel, layout: Any) -> Tensor:
    with lora.active(model.policy, None):
        return model.response_logps(layout)


def _batch(
    dataset: PairDataset, part: PairPass, layout: Any, index: int, scored: Any, reference: Tensor | None
) -> tuple[Batch, PairTerms]:
    known = {name: each.to(scored.logps.device) for name, each in collate(dataset, part.pairs, part.sequences).items()}
    pairs, rewards, logps = known["pairs"], known["rewards"], scored.logps
    margins = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    alone = _one_hot(len(dataset.objectives), index, logps)
    batch = Batch(
        logps=logps,
        mask=layout.mask,
        pairs=pairs,
        pair_objective=known["pair_objective"],
        preference=alone.expand(len(part.sequences), -1),
        strength=known["strength"],
        groups=known["groups"],
        ref_logps=reference,
        margins=margins,
        entropy=scored.entropy,
        objectives=dataset.objectives,
    )
    one = logps.new_ones(len(pairs))
    return batch, PairTerms(one, one * 0, one, margins[:, index])


def _one_hot(number: int, index: int, like: Tensor) -> Tensor:
    values: Sequence[float] = [float(place == index) for place in range(number)]
    return like.new_tensor(values)

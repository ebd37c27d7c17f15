"""Inner products of the objectives' gradients at a candidate's adapter: on labelled pairs where the loss learns from
them, else on the candidate's own samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from moalign import door
from moalign.api import Objective
from moalign.config import Config
from moalign.data.dataset import PairDataset
from moalign.diagnostics import pair_gradients
from moalign.diagnostics.measurement import Sampled
from moalign.engine import gram, owned
from moalign.engine.model import LanguageModel
from moalign.engine.rollouts import sequence_of
from moalign.lora import Stack
from moalign.types import Sample

ON_SAMPLES = frozenset({"groups", "reference", "old_logps", "entropy"})  # what ``gram`` supplies

Array = NDArray[np.float64]


def unsupplied(objective: Objective, config: Config, width: int) -> str | None:
    """In words, why a candidate's loss cannot be asked as the run asked it; None: it can.

    ``width``: of a hidden state. Raises PluginError where the loss fails.
    """
    wants, name = objective.wants, config.loss.name
    supplied = ON_SAMPLES if "groups" in wants else pair_gradients.SUPPLIED
    lacking = sorted(wants - supplied)
    if door.call(objective, "guides"):
        lacking.append("guides")
    if type(objective).views is not Objective.views:
        lacking.append("views")
    if owned.first_values(objective, width, config.seed):
        lacking.append("parameters of its own")
    if lacking:
        return f"no conflict matrix: the loss '{name}' needs {', '.join(lacking)}"
    if "groups" in wants and not objective.linear:
        return f"no conflict matrix: in the loss '{name}' a response's advantage is no factor of its own loss"
    shaped = "groups" in wants or ("margins" in wants and config.rollouts is not None)
    if shaped and any(each.transform for each in config.objectives.values()):
        return "no conflict matrix: the run shapes its rewards with transforms"
    return None


def products(
    model: LanguageModel,
    stack: Stack,
    slot: str,
    objective: Objective,
    objectives: Sequence[str],
    pairs: PairDataset | None,
    sampled: Sampled | None,
    prompts: Sequence[tuple[int, ...]],
    candidate: str,
) -> tuple[Array | None, str]:
    """G[M,M], and in words what the gradients were taken on; None, and why there is none.

    A loss on sampled responses counts each by the advantage that the objective's reward alone gives it; the part of the
    loss that no advantage touches has no place in it.
    """
    wants = objective.wants
    if pairs is not None and "groups" not in wants and any(_has_pairs(pairs, index, wants) for index in _range(pairs)):
        found = pair_gradients.pair_gradient_products(model, stack, slot, objective, pairs, candidate)
        return found.numpy(), "labelled pairs"
    if wants.isdisjoint({"groups", "margins"}):
        return None, "no conflict matrix: the loss learns from labelled pairs, and there are none"
    if sampled is None or not set(objectives) <= set(sampled.rewards):
        return None, "no conflict matrix: the loss learns from rewards, and not every objective has one"
    rewards = np.stack([sampled.rewards[name] for name in objectives], axis=1)
    dataset = _of_samples(sampled, rewards, objectives, prompts, alone="groups" in wants)
    if len(dataset.pairs) == 0:
        return None, "no conflict matrix: it takes two responses to a prompt, each with all rewards"
    if "groups" not in wants:
        found = pair_gradients.pair_gradient_products(model, stack, slot, objective, dataset, candidate)
    else:
        advantages = _advantages(objective, dataset, sampled, candidate)
        found = gram.gradient_products(model, slot, objective, dataset, advantages, candidate)
    return found.numpy(), "its own samples"


def _range(pairs: PairDataset) -> range:
    return range(len(pairs.objectives))


def _has_pairs(pairs: PairDataset, index: int, wants: frozenset[str]) -> bool:
    return len(pair_gradients.pairs_of(pairs, index, "margins" in wants)) > 0


def _of_samples(
    sampled: Sampled, rewards: Array, objectives: Sequence[str], prompts: Sequence[tuple[int, ...]], alone: bool
) -> PairDataset:
    """Samples with all rewards as a dataset; ``alone``: each is a unit, else all pairs of one prompt's are."""
    known = np.flatnonzero(np.isfinite(rewards).all(1))
    groups = np.array(sampled.prompts, dtype=np.int64)
    if alone:
        units = [(row, row) for row in known]
    else:
        units = [
            pair for group in np.unique(groups) for pair in combinations(known[groups[known] == group].tolist(), 2)
        ]
    return PairDataset(
        objectives=tuple(objectives),
        sequences=tuple(sequence_of(each, prompts) for each in sampled.rollouts),
        samples=tuple(Sample("", each.text) for each in sampled.rollouts),
        pairs=np.array(units, dtype=np.int64).reshape(-1, 2),
        pair_objective=np.full(len(units), -1),
        strength=np.ones(len(units)),
        rewards=rewards.copy(),
        groups=groups,
        counts={},
        ref_logps=sampled.reference,
    )


def _advantages(objective: Objective, dataset: PairDataset, sampled: Sampled, candidate: str) -> Array:
    """[M,P] of the units, by each objective's reward alone."""
    rows = dataset.pairs[:, 0]
    groups = torch.from_numpy(dataset.groups[rows])
    ratios = torch.from_numpy(sampled.log_ratios[rows]) if "reference" in objective.wants else None
    found = []
    for index in _range(dataset):
        signal = torch.from_numpy(np.ascontiguousarray(dataset.rewards[rows, index]))
        found.append(door.call(objective, "advantages", signal, groups, ratios, candidate=candidate).numpy())
    return np.stack(found).astype(np.float64)

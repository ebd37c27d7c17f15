"""From a candidate's token log-probabilities to its loss, through its combiner and objective, with both checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moalign import door
from moalign.batch import Batch, PairTerms
from moalign.engine.metrics import StepMetrics
from moalign.engine.trainee import Job
from moalign.errors import PluginError


def loss_of(
    batch: Batch, job: Job, metrics: StepMetrics | None, thorough: bool = True, weights: Tensor | None = None
) -> Tensor:
    """The weighted sum over the pairs of the batch, with its graph; ``thorough`` as for ``door.call``.

    ``weights`` [P]: what the weight of each pair is multiplied by, which its loss does not see; None: nothing.
    Where combined rewards have labelled sampled pairs, the loss gets the labels alone, and the metrics all rewards.

    Raises PluginError naming the plugin.
    """
    about: dict[str, Any] = {"candidate": job.candidate, "thorough": thorough}
    if "groups" in job.needs:
        terms, unit = PairTerms.of_rows(batch.logps), "response"
    elif job.labels_rounds:
        terms, unit = PairTerms.of_rows(batch.strength), "pair"
    else:
        terms, unit = _checked_terms(door.call(job.combiner, "pair_terms", batch, **about), batch, job), "pair"
    shown = replace(batch, rewards=None, margins=None) if job.labels_rounds else batch
    given, seen = (shown, terms) if terms.reversed is None else both_ways(shown, terms)
    losses = _checked_losses(door.call(job.objective, "loss", given, seen, **about), seen.weight, unit, job)
    if unit == "response":  # one that a step meets twice, in two epochs, is one row and counts twice
        each = batch.pairs[:, 0]
        losses, seen = losses[each], replace(seen, weight=seen.weight[each])
    if weights is not None:  # of each way round, where there are both
        seen = replace(seen, weight=seen.weight * weights.repeat(len(seen.weight) // len(weights)))
    if metrics is not None:
        metrics.add(batch, losses.detach(), seen.weight, getattr(job.objective, "beta", 1.0))
    counts = seen.weight != 0  # a pair without weight must not bring a NaN into the sum
    return (losses[counts] * seen.weight[counts]).sum()


def both_ways(batch: Batch, terms: PairTerms) -> tuple[Batch, PairTerms]:
    """Each pair as it is and, behind all of them, the other way round with its weight ``reversed``; 2 P pairs."""
    other = terms.weight if terms.reversed is None else terms.reversed
    twice, against = (lambda values: torch.cat([values, values])), (lambda values: torch.cat([values, -values]))
    pairs = torch.cat([batch.pairs, batch.pairs.flip(1)])
    margins = None if batch.margins is None else against(batch.margins)
    preferred = None if batch.preferred is None else torch.cat([batch.preferred, 1 - batch.preferred])
    objective, strength = twice(batch.pair_objective), twice(batch.strength)
    difference = None if terms.difference is None else against(terms.difference)
    weight = torch.cat([terms.weight, other])
    views = {name: twice(rows) for name, rows in batch.views.items()}
    turned = replace(batch, pairs=pairs, pair_objective=objective, strength=strength, margins=margins, views=views)
    return (
        replace(turned, preferred=preferred),
        PairTerms(twice(terms.scale), against(terms.margin), weight, difference),
    )


def _checked_terms(terms: PairTerms, batch: Batch, job: Job) -> PairTerms:
    pairs = len(batch.pairs)
    names = ["scale", "margin", "weight"]
    if "margins" in job.objective.wants or getattr(terms, "difference", None) is not None:
        names.append("difference")
    if getattr(terms, "reversed", None) is not None:
        names.append("reversed")
    for name in names:
        value: Any = getattr(terms, name, None)
        if not (_like(value, batch.logps, pairs) and bool(torch.isfinite(value).all())):
            who = door.origin(job.combiner).who
            expected = _described(batch.logps.dtype, (pairs,), batch.logps.device)
            raise PluginError(f"{who}, in pair_terms: {name} must be finite, {expected}; it is {_shape(value)}")
    return terms


def _checked_losses(losses: Tensor, weight: Tensor, unit: str, job: Job) -> Tensor:
    who = f"{door.origin(job.objective).who}, in loss"
    if not _like(losses, weight, len(weight)):
        raise PluginError(
            f"{who}: it must return one loss per {unit}, {_shape(weight)}, not {_shape(losses)}; do not reduce"
        )
    if torch.is_grad_enabled() and not losses.requires_grad:
        given = "batch.logps" if job.reads_logps else "what it was given"
        raise PluginError(f"{who}: it returned a loss without a gradient; did it detach {given}?")
    return losses


def _like(value: Any, logps: Tensor, pairs: int) -> bool:
    right = isinstance(value, Tensor) and tuple(value.shape) == (pairs,)
    return right and value.dtype == logps.dtype and value.device == logps.device


def _shape(value: Any) -> str:
    return _described(value.dtype, value.shape, value.device) if isinstance(value, Tensor) else type(value).__name__


def _described(dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"

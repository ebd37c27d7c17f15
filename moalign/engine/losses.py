"""From a candidate's token log-probabilities to its loss, through its combiner and objective, with both checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moalign.engine.metrics import StepMetrics
from moalign.engine.trainee import Job
from moalign.errors import PluginError
from moalign.types import Batch, PairTerms


def loss_of(batch: Batch, job: Job, metrics: StepMetrics | None) -> Tensor:
    """The weighted sum over the pairs of the batch, with its graph. Raises PluginError naming the plugin."""
    terms = _checked_terms(_call(job.combiner.pair_terms, batch), batch, job)
    losses = _checked_losses(_call(job.objective.loss, batch, terms), batch, job)
    if metrics is not None:
        metrics.add(batch, losses.detach(), terms.weight, getattr(job.objective, "beta", 1.0))
    counts = terms.weight != 0  # a pair without weight must not bring a NaN into the sum
    return (losses[counts] * terms.weight[counts]).sum()


def _call(method: Callable[..., Any], *arguments: Any) -> Any:
    """Call into a plugin; what it raises is reported under its name."""
    try:
        return method(*arguments)
    except (PluginError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        who = type(getattr(method, "__self__", method))
        raise PluginError(f"{who.__module__}.{who.__name__} raised {type(error).__name__}: {error}") from error


def _checked_terms(terms: PairTerms, batch: Batch, job: Job) -> PairTerms:
    pairs = len(batch.pairs)
    who = type(job.combiner).__name__
    for name in ("scale", "margin", "weight"):
        value = getattr(terms, name, None)
        good = isinstance(value, Tensor) and tuple(value.shape) == (pairs,) and bool(torch.isfinite(value).all())
        if not good:
            raise PluginError(f"combiner {who}: {name} must be {pairs} finite numbers, it is {_shape(value)}")
    return terms


def _checked_losses(losses: Tensor, batch: Batch, job: Job) -> Tensor:
    who = f"objective {type(job.objective).__name__}"
    pairs = len(batch.pairs)
    if not isinstance(losses, Tensor) or tuple(losses.shape) != (pairs,):
        raise PluginError(f"{who} must return one loss per pair, [{pairs}], not {_shape(losses)}; do not reduce")
    if torch.is_grad_enabled() and not losses.requires_grad:
        raise PluginError(f"{who} returned a loss without a gradient; did it detach batch.logps?")
    return losses


def _shape(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

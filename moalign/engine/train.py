"""Train one candidate: the one loop, for every objective, combiner and source of batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from moalign import lora
from moalign.api import Combiner, Objective
from moalign.config import TrainSettings
from moalign.data.batching import collate
from moalign.data.dataset import PairDataset
from moalign.engine.batches import BatchSource
from moalign.engine.layout import Layout, lay_out
from moalign.engine.metrics import StepMetrics
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.passes import PairPass, pair_passes
from moalign.engine.scoring import LogpCache
from moalign.errors import PluginError, TrainingError
from moalign.seeds import derive
from moalign.types import Batch, PairTerms

SKIPS_IN_A_ROW = 3  # so many steps without finite numbers end a candidate


@dataclass(frozen=True)
class FrozenReward:
    """An implicit reward, beta * (log pi_k - log pi_ref), from an adapter in a slot of the model."""

    adapter: str
    identity: str
    beta: float


@dataclass(frozen=True)
class Job:
    """Everything that decides one candidate's training."""

    candidate: str
    preference: tuple[float, ...]
    objective: Objective
    combiner: Combiner
    needs: frozenset[str]
    objectives: tuple[str, ...]
    settings: TrainSettings
    seed: int
    margins_from: Mapping[int, FrozenReward]


@dataclass(frozen=True)
class Trained:
    """What the loop hands back beside the adapter in the model: steps taken, steps skipped, response tokens seen."""

    steps: int
    skipped: int
    tokens: int


def train(
    model: LanguageModel,
    source: BatchSource,
    job: Job,
    cache: LogpCache,
    accelerator: Accelerator,
    on_step: Callable[[int, dict[str, Any]], None],
) -> Trained:
    """Train the slot ``candidate`` of the model from fresh weights.

    ``on_step`` receives the step number and its metrics. Raises TrainingError where losses or gradients stay
    non-finite, PluginError where a plugin returns what it must not. Non-finite numbers never reach the optimizer.
    """
    settings = job.settings
    accelerator.free_memory()  # it would keep the optimizer of every candidate before this one
    parameters = list(_fresh_adapter(model, job).values())
    for parameter in parameters:
        parameter.grad = None  # a candidate that failed in the middle of a step may have left one
    optimizer = accelerator.prepare(
        torch.optim.AdamW(
            parameters, lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.999), fused=True
        )
    )
    packing = model.packing
    if settings.tokens_per_pass is not None:
        packing = replace(packing, limit=settings.tokens_per_pass)
    skipped = in_a_row = tokens = 0
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * schedule(settings, step)
        metrics = StepMetrics(job.objectives)
        dataset, pairs = source.at(step)
        problem = None
        for number, part in enumerate(pair_passes(dataset, pairs, packing)):
            loss = _pass(model, dataset, part, job, cache, source.cacheable, (step, number), metrics)
            if not torch.isfinite(loss):
                problem = f"loss is {loss.item()}"
                break
            accelerator.backward(loss / len(pairs))
        if problem is None:
            norm = float(accelerator.clip_grad_norm_(parameters, settings.max_gradient_norm))
            metrics.gradient_norm = norm
            problem = None if math.isfinite(norm) else f"gradient norm is {norm}"
        tokens += metrics.tokens
        if problem is None:
            optimizer.step()
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        optimizer.zero_grad()
        on_step(step, metrics.summary() | {"lr": group["lr"]} | ({"skipped": problem} if problem else {}))
        if in_a_row == SKIPS_IN_A_ROW:
            raise TrainingError(
                f"step {step}: {problem}, for {SKIPS_IN_A_ROW} steps in a row; the optimizer was not called. "
                "A smaller train.lr usually helps"
            )
    cache.save()
    return Trained(settings.steps, skipped, tokens)


def schedule(settings: TrainSettings, step: int) -> float:
    """Factor on the learning rate: a linear warm-up from above 0, then constant, or to 0 after the last step."""
    warmup = math.ceil(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def _fresh_adapter(model: LanguageModel, job: Job) -> dict[str, torch.nn.Parameter]:
    lora.initialise(model.policy, TRAINED, derive(job.seed, "adapter"))
    parameters = lora.trainable(model.policy, TRAINED)
    others = [n for n, p in model.policy.named_parameters() if p.requires_grad and n not in parameters]
    if others or not parameters:
        raise TrainingError(f"the parameters to train are not exactly the adapter's: {others[:3] or 'none found'}")
    model.checkpoint(job.settings.gradient_checkpointing)
    return parameters


def _pass(
    model: LanguageModel,
    dataset: PairDataset,
    part: PairPass,
    job: Job,
    cache: LogpCache,
    cacheable: bool,
    at: tuple[int, int],
    metrics: StepMetrics,
) -> Tensor:
    """The weighted sum of the losses of one pass, with its graph."""
    sequences = [dataset.sequences[index] for index in part.sequences]
    layout = lay_out(sequences, part.rows, model.pad_id, model.packing.multiple).to(model.device)
    known = {name: tensor.to(model.device) for name, tensor in collate(dataset, part.pairs, part.sequences).items()}

    def frozen_logps(adapter: str | None, identity: str) -> Tensor:
        return cache.logps(sequences, layout, adapter, identity, keep=cacheable)

    reference = frozen_logps(None, "") if needs_reference(job) else None
    rewards = _rewards(known["rewards"], job, frozen_logps, reference)
    pairs = known["pairs"]
    batch = Batch(
        logps=_policy_logps(model, layout, job, at),
        mask=layout.mask,
        pairs=pairs,
        pair_objective=known["pair_objective"],
        preference=torch.tensor(job.preference, device=model.device).expand(len(sequences), -1),
        strength=known["strength"],
        groups=known["groups"],
        ref_logps=reference,
        rewards=rewards,
        margins=None if rewards is None else rewards[pairs[:, 0]] - rewards[pairs[:, 1]],
    )
    terms = _checked_terms(_call(job.combiner.pair_terms, batch), batch, job)
    losses = _checked_losses(_call(job.objective.loss, batch, terms), batch, job)
    metrics.add(batch, losses.detach(), terms.weight, getattr(job.objective, "beta", 1.0))
    counts = terms.weight != 0  # a pair without weight must not bring a NaN into the sum
    return (losses[counts] * terms.weight[counts]).sum()


def needs_reference(job: Job) -> bool:
    return "reference" in job.needs or bool(job.margins_from)


def _rewards(
    known: Tensor, job: Job, frozen_logps: Callable[[str | None, str], Tensor], reference: Tensor | None
) -> Tensor | None:
    """Scores per row and objective [N,M] where something needs them: from the data, or from frozen adapters."""
    if "margins" not in job.needs:
        return None
    rewards = known.clone()
    for index, frozen in job.margins_from.items():
        assert reference is not None
        rewards[:, index] = frozen.beta * (frozen_logps(frozen.adapter, frozen.identity) - reference).sum(-1)
    return rewards


def _policy_logps(model: LanguageModel, layout: Layout, job: Job, at: tuple[int, int]) -> Tensor:
    """Only adapter dropout is ever switched on; masks are a function of (seed, candidate, step, pass of the step)."""
    switched: list[torch.nn.Module] = [
        dropout for layer in lora.layers(model.policy) if (dropout := lora.dropout_of(layer, TRAINED))
    ]
    if job.settings.gradient_checkpointing:
        # transformers checkpoints only in training mode; the children stay in eval
        switched += [module for module in model.policy.modules() if getattr(module, "gradient_checkpointing", False)]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=bool(switched)):
        if switched:
            torch.manual_seed(derive(job.seed, "dropout", job.candidate, *at))
        for module in switched:
            module.training = True
        try:
            return model.response_logps(layout)
        finally:
            for module in switched:
                module.training = False


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
    if not losses.requires_grad:
        raise PluginError(f"{who} returned a loss without a gradient; did it detach batch.logps?")
    return losses


def _shape(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

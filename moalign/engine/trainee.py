"""One candidate in training: what decides it, its optimizer, and the guard between bad numbers and its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moalign import door, lora
from moalign.api import Combiner, Conditioner, Objective, Plugin, Reference
from moalign.config import TrainSettings
from moalign.data.dataset import PairDataset
from moalign.engine import owned, snapshots
from moalign.engine.batches import BatchSource, RolloutSource
from moalign.engine.conditioned import ConditionedPairs, ConditionedRollouts
from moalign.engine.conditioning import Conditioning
from moalign.engine.early_stop import EarlyStop
from moalign.engine.metrics import StepMetrics, number
from moalign.engine.model import LanguageModel
from moalign.engine.reference_policy import BASE, FrozenPolicy, MovingReference, distance_on
from moalign.engine.weighing import Weighing
from moalign.errors import ConfigError, MoalignError, RunError, TrainingError
from moalign.lora.posterior import Moments
from moalign.seeds import derive
from moalign.types import Preference

LOOKS_CLOSELY_EVERY = 50  # steps; a close look takes 0.1 ms of each call into a plugin
SKIPS_IN_A_ROW = 3  # so many steps without finite numbers end a candidate


@dataclass(frozen=True)
class FrozenReward:
    """An implicit reward, beta * (log pi_k - log pi_ref), from an adapter in a slot of the model."""

    adapter: str
    identity: str
    beta: float


@dataclass(frozen=True)
class Job:
    """Everything that decides one candidate's training. ``held_out``: the pairs that an early stop looks at.

    ``conditioning``: of a candidate that is trained for many preferences; ``preference`` is then one of them.
    ``reads_logps``: whether the loss reads token log-probabilities; where it does not, they are NaN for it, and a pass
    in which nobody reads any does without the output head. ``reference``: how the reference moves (None: it does not),
    ``begins_with``: what it is at first. ``labels_rounds``: whether what the combiner has to say is in the labels of
    the pairs, which it made from rewards.
    ``weighing``: the preference by which the combiner weighs the objectives' losses anew in each step; None: it has
    nothing to say of losses. ``guides``: further frozen policies that the loss reads.
    """

    candidate: str
    preference: tuple[float, ...]
    objective: Objective
    combiner: Combiner
    needs: frozenset[str]
    objectives: tuple[str, ...]
    settings: TrainSettings
    seed: int
    margins_from: Mapping[int, FrozenReward]
    rank: int
    alpha: float
    held_out: PairDataset | None = None
    conditioning: Conditioning | None = None
    reads_logps: bool = True
    reference: Reference | None = None
    begins_with: FrozenPolicy = BASE
    labels_rounds: bool = False
    weighing: Preference | None = None
    guides: Mapping[str, FrozenPolicy] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What the loop hands back beside the adapter in its slot: steps taken, steps skipped, response tokens seen.

    ``best_step``: the step whose weights these are, where an early stop was asked for; ``stopped_at_step``: the last
    one, where it came before its time. Both are numbered as in metrics.jsonl, from 0.
    """

    steps: int
    skipped: int
    tokens: int
    stopped_at_step: int | None = None
    best_step: int | None = None


@dataclass
class Trainee:
    """A job, its batches, and the state of its training in the model's slot ``slot``.

    ``parent``: the folder of an adapter from which training starts, with its rank and alpha (None: fresh weights).
    ``parameters``: the adapter's; ``owned``: the loss's, by name; ``conditioned``: the conditioner's.
    ``problem``: what is wrong with the step under way; ``error``: why training has ended before its time.
    """

    job: Job
    source: BatchSource
    slot: str
    on_step: Callable[[int, dict[str, Any]], None]
    parent: Path | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)
    owned: dict[str, nn.Parameter] = field(default_factory=dict)
    conditioned: dict[str, nn.Parameter] = field(default_factory=dict)
    reference: MovingReference | None = None
    optimizer: Any = None
    metrics: StepMetrics = field(init=False)
    problem: str | None = None
    error: MoalignError | None = None
    skipped: int = 0
    in_a_row: int = 0
    tokens: int = 0
    early_stop: EarlyStop | None = field(init=False, default=None)
    held_out_loss: float | None = None
    moments: Moments = field(default_factory=Moments)  # of the adapter over the last steps
    over: bool = False
    looks_closely: bool = True  # at what plugins do to the process, in the step under way
    weighing: Weighing | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        job, settings = self.job, self.job.settings
        if job.weighing is not None:
            self.weighing = Weighing(job.combiner, job.weighing, job.objectives, job.candidate)
        if settings.early_stop is not None:
            if self.job.held_out is None:
                raise ConfigError("train.early_stop: there are no held-out pairs to look at; leave it out")
            self.early_stop = EarlyStop(settings.early_stop, settings.steps)

    def prepare(self, model: LanguageModel, parameters: list[nn.Parameter]) -> None:
        """First weights and a fresh optimizer of the slot's parameters, which have gradients to add to.

        The loss's own parameters get theirs beside them.
        """
        job, settings = self.job, self.job.settings
        first = owned.first_values(job.objective, model.width, job.seed, job.candidate)
        if self.parent is None:
            lora.initialise(model.policy, self.slot, derive(job.seed, "adapter"), job.rank, job.alpha)
        else:
            first = self._inherited(model, self.parent, first)
        groups: list[dict[str, Any]] = [{"params": parameters, "factor": 1.0}]
        self.parameters = parameters
        self.owned = _trained(job.objective, first, model.device, job.candidate, groups)
        if job.conditioning is not None:
            conditioner = job.conditioning.conditioner
            first = owned.first_values(conditioner, job.conditioning.shape, job.seed, job.candidate)
            self.conditioned = _trained(conditioner, first, model.device, job.candidate, groups)
        if job.reference is not None and not job.reference.fixed:
            self.reference = MovingReference(job.reference, model, self.slot, job.begins_with, job.candidate)
        if isinstance(self.source, RolloutSource):
            self.source.owned = self.owned
            self.source.compared_with, self.source.moving = job.begins_with, self.reference
        if isinstance(self.source, ConditionedRollouts | ConditionedPairs):
            self.source.parameters = self.conditioned
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.999), fused=True
        )

    def _inherited(self, model: LanguageModel, parent: Path, first: dict[str, Tensor]) -> dict[str, Tensor]:
        """Read the parent's adapter into the slot; what the loss owned there, or the first values if it owned none."""
        try:
            lora.read(model.policy, self.slot, parent, model.fingerprint)
            return owned.read(parent, first, model.fingerprint)
        except RunError as error:  # of this parent, which others need not have
            raise TrainingError(str(error)) from error

    @property
    def compared_with(self) -> FrozenPolicy:
        """The reference as it is now."""
        return self.job.begins_with if self.reference is None else self.reference.now

    def move_reference(self, model: LanguageModel, step: int, dataset: PairDataset, pairs: NDArray[np.int64]) -> None:
        """Where the responses are in the data; with rounds of them the reference moves when a round begins."""
        if self.reference is not None and not isinstance(self.source, RolloutSource):
            rows = np.unique(dataset.pairs[pairs])
            self.reference.before(step, None, distance_on(model, self.slot, dataset, rows))

    @property
    def result(self) -> Trained:
        """Raises what ended the training before its time."""
        if self.error is not None:
            raise self.error
        stop = self.early_stop
        if stop is None:
            return Trained(self.job.settings.steps, self.skipped, self.tokens)
        last, best = stop.stopped_at_step, stop.looks.best_step
        return Trained(stop.steps if last is None else last + 1, self.skipped, self.tokens, last, best)

    def goes_on(self, step: int) -> bool:
        return self.error is None and not self.over and step < self.job.settings.steps

    @property
    def sound(self) -> bool:
        """Whether the step under way is still of use."""
        return self.error is None and self.problem is None

    def begin(self, step: int) -> None:
        self.problem, self.held_out_loss = None, None
        self.looks_closely = step % LOOKS_CLOSELY_EVERY == 0
        self.metrics = StepMetrics(self.job.objectives)
        if self.weighing is not None:
            self.weighing.begin()
        for group in self.optimizer.param_groups:
            group["lr"] = self.job.settings.lr * schedule(self.job.settings, step) * group["factor"]

    @property
    def trained(self) -> list[nn.Parameter]:
        """All that is trained: the adapter's parameters, then those beside it."""
        return [*self.parameters, *(each for _, own in self._beside for each in own)]

    def weigh(self, step: int) -> None:
        """Where a rule weighs the objectives' losses: from their gradients to that of the step."""
        if self.weighing is not None and self.sound:
            self.problem = self.weighing.settle(step, self.trained, len(self.parameters))
            self.metrics.minimised = self.weighing.minimised

    def end(self, step: int) -> None:
        """Clip and step, or skip where a number is not finite: such numbers never reach the optimizer."""
        if self.problem is None:
            # apart: a large error of what the loss owns must not shorten the adapter's step, nor the other way round
            limit = self.job.settings.max_gradient_norm
            norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
            self.metrics.gradient_norm = norm
            self.problem = None if math.isfinite(norm) else f"gradient norm is {norm}"
            for owner, own in self._beside:
                beside = float(nn.utils.clip_grad_norm_(own, limit)) if own else 0.0
                if self.problem is None and not math.isfinite(beside):
                    self.problem = f"gradient norm of the parameters of {door.origin(owner).who} is {beside}"
        self.tokens += self.metrics.tokens
        if self.problem is None:
            self.optimizer.step()
            self.in_a_row = 0
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.optimizer.zero_grad(set_to_none=False)  # they are rows of one block
        if snapshots.counts(step, self.job.settings):
            snapshots.note(self.moments, self.parameters)
        if self.in_a_row == SKIPS_IN_A_ROW:
            self.error = TrainingError(
                f"step {step}: {self.problem}, for {SKIPS_IN_A_ROW} steps in a row; the optimizer was not called. "
                "A smaller train.lr usually helps"
            )

    @property
    def _beside(self) -> list[tuple[Plugin, list[nn.Parameter]]]:
        """What is trained beside the adapter, with whose it is."""
        own: list[tuple[Plugin, list[nn.Parameter]]] = [(self.job.objective, list(self.owned.values()))]
        if self.job.conditioning is not None:
            own.append((self.job.conditioning.conditioner, list(self.conditioned.values())))
        return own

    def looks_after(self, step: int) -> bool:
        return self.error is None and self.early_stop is not None and self.early_stop.due(step)

    def looked(self, step: int, loss: float) -> None:
        """Take note of the held-out loss after this step."""
        assert self.early_stop is not None
        self.held_out_loss = loss
        self.over = self.early_stop.note(step, loss, [*self.parameters, *self.owned.values()])
        if self.over and self.early_stop.looks.best_step is None:
            self.error = TrainingError(
                f"step {step}: no look at the held-out pairs found a finite loss, the last one {loss}, so that no "
                "weights are the best. A smaller train.lr usually helps"
            )

    def tell(self, step: int) -> None:
        """Pass on the figures of the step that has ended, and of the look after it."""
        told: dict[str, Any] = {"skipped": self.problem} if self.problem else {}
        if self.held_out_loss is not None:
            told["held_out_loss"] = number(self.held_out_loss)
        known = getattr(self.source, "figures", {}) | ({} if self.weighing is None else self.weighing.figures)
        known |= {} if self.reference is None else self.reference.figures
        figures = {name: number(value) for name, value in known.items()}
        self.on_step(step, self.metrics.summary() | figures | {"lr": self.optimizer.param_groups[0]["lr"]} | told)


def _trained(
    owner: Objective | Conditioner,
    first: Mapping[str, Tensor],
    device: torch.device,
    candidate: str,
    groups: list[dict[str, Any]],
) -> dict[str, nn.Parameter]:
    """Parameters with these first values, which have gradients to add to; each becomes a group of the optimizer's."""
    made = {name: nn.Parameter(values.to(device)) for name, values in first.items()}
    for name, parameter in made.items():
        parameter.grad = torch.zeros_like(parameter)
        groups.append({"params": [parameter], "factor": owned.lr_factor(owner, name, candidate)})
    return made


def schedule(settings: TrainSettings, step: int) -> float:
    """Factor on the learning rate: a linear warm-up from above 0, then constant, or to 0 after the last step."""
    warmup = math.ceil(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

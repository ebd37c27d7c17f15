"""What a sweep will cost, from a short probe of the real thing: `moalign sweep --dry-run`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from moalign import door
from moalign.engine.train import train
from moalign.sweeps import budget, known, together
from moalign.sweeps.budget import Purse
from moalign.sweeps.candidate import batch_source, job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import Plan
from moalign.sweeps.proposals import first_trained, next_candidates
from moalign.sweeps.workshop import Workshop, opened_workshop
from moalign.types import Candidate, Outcome, Space

PROBE_STEPS = 4  # the first is warm-up and does not count
PROBE_LOOKS_EVERY = 2


@dataclass(frozen=True)
class Estimate:
    """Seconds are of this machine; ``tokens`` are response tokens that are trained on, over all candidates.

    ``steps``: of each candidate that is trained. ``seconds_per_step``: for each of them with ``together`` in a pass.
    ``seconds_of_sampling`` is for all rounds of one candidate, 0 without rollouts. ``seconds_of_looks`` is for all its
    looks at the held-out pairs, 0 without train.early_stop; where a candidate will end early is not foreseen.
    ``memory`` is that of ``together`` candidates in one pass, in bytes, the base among them.
    ``reason``: what the search says of itself. ``goes_on``: ``candidates`` are its first proposal, and it wants more.
    ``purse``: what there is to spend, where the search has a budget, and ``fitting`` those that it pays.
    """

    candidates: tuple[Candidate, ...]
    steps: tuple[int, ...]
    tokens: int
    seconds_per_step: float
    seconds_per_step_alone: float
    seconds_per_evaluation: float
    seconds_of_sampling: float
    seconds_of_looks: float
    counts: dict[str, int]
    together: int
    memory: int
    purse: Purse | None = None
    reason: str = ""
    goes_on: bool = False
    fitting: tuple[Candidate, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all candidates."""
        return self._seconds(self.steps, len(self.candidates))

    @property
    def seconds_paid(self) -> float:
        """Of those that the budget pays."""
        return self._seconds(self.steps_paid, len(self.fitting))

    @property
    def tokens_paid(self) -> int:
        """Of those that the budget pays."""
        return round(self.tokens * sum(self.steps_paid) / sum(self.steps))

    @property
    def steps_paid(self) -> tuple[int, ...]:
        """Of each candidate that is trained and that the budget pays."""
        trained = [candidate.id for candidate in self.candidates if candidate.kind == "trained"]
        paid = {candidate.id for candidate in self.fitting}
        return tuple(steps for name, steps in zip(trained, self.steps, strict=True) if name in paid)

    def _seconds(self, steps: tuple[int, ...], evaluated: int) -> float:
        beside = len(steps) * (self.seconds_of_sampling + self.seconds_of_looks)
        return sum(steps) * self.seconds_per_step + beside + evaluated * self.seconds_per_evaluation


def estimate(plan: Plan, observer: Observer) -> Estimate:
    """Train a few throw-away steps of the first candidate, evaluate the base; write nothing.

    Rewards from frozen adapters (one forward pass each, kept for all candidates) are not in the estimate, because
    those adapters are not there yet.
    """
    with opened_workshop(plan, Path(), observer, keep_cache=False) as workshop:
        return _estimate(plan, workshop, observer)


def _goes_on(candidates: Sequence[Candidate], plan: Plan, space: Space) -> bool:
    """Whether the search wants more once it has these: asked with made up scores, by which each has what it is for.

    One that breaks on them does look at what was reached, so that it may go on.
    """
    tried = [
        Outcome(
            id=each.id,
            status="done",
            preference=each.preference,
            scores={name: each.preference.values.get(name, 0.0) for name in plan.objectives},
            kl=0.0,
            kind=each.kind,
            changes=each.changes,
        )
        for each in candidates
    ]
    try:
        return bool(plan.propose(tried, space))
    except Exception:
        return True


def _estimate(plan: Plan, workshop: Workshop, observer: Observer) -> Estimate:
    purse = budget.untouched(plan, workshop)
    space = known.paid(plan.space, purse)
    candidates = next_candidates(plan, workshop, (), space)
    fitting, _ = budget.split(candidates, purse, plan)
    first = first_trained(candidates, plan)
    trained = [candidate for candidate in candidates if candidate.kind == "trained"]
    observer.on_phase("measuring a few steps")
    stop = plan.config.train.early_stop
    shortened = {"steps": PROBE_STEPS, "early_stop": stop and stop.model_copy(update={"every": PROBE_LOOKS_EVERY})}
    job = replace(job_of(first, workshop, ()), settings=plan.config.train.model_copy(update=shortened))
    times: list[float] = []
    tokens: list[int] = []

    def on_step(step: int, metrics: dict[str, Any]) -> None:
        times.append(time.perf_counter())
        tokens.append(metrics["tokens"])

    source = batch_source(first, workshop)
    begin = time.perf_counter()
    source.at(0)
    drawing = time.perf_counter() - begin
    train(workshop.model, source, job, workshop.cache, workshop.accelerator, on_step)
    durations = [after - before for before, after in pairwise(times)]
    looking = 0.0
    if stop is not None:  # the first look, which meets held-out pairs for the first time, does not count
        *_, plain, with_look = durations
        durations, looking = [plain], max(0.0, with_look - plain)
    alone = median(durations)
    trial = [candidate for candidate in trained if not workshop.implicit([candidate])] or trained[:1]
    size, measured = together.chosen_size(trial, workshop)
    size = min(size, len(trial))
    if not math.isfinite(measured.get(size, math.inf)):  # as of one alone, which is not tried
        measured = {1: alone} | ({size: together.seconds_per_candidate(trial[:size], workshop)} if size > 1 else {})
    base, beyond = together.memory_of(trial, workshop, [size])
    steps = [plan.variant(candidate.changes).train.steps for candidate in trained]
    begin = time.perf_counter()
    workshop.evaluate(None)
    return Estimate(
        candidates=tuple(candidates),
        steps=tuple(steps),
        tokens=round(median(tokens) * sum(steps)),
        seconds_per_step=measured[size],
        seconds_per_step_alone=measured[1],
        seconds_per_evaluation=time.perf_counter() - begin,
        seconds_of_looks=looking * math.ceil(plan.config.train.steps / stop.every) if stop else 0.0,
        seconds_of_sampling=drawing * plan.config.rollouts.rounds if plan.config.rollouts else 0.0,
        counts=dict(workshop.material.counts),
        together=size,
        memory=base + beyond[size],
        purse=purse,
        reason=door.call(plan.search, "reason", space),
        goes_on=_goes_on(candidates, plan, space),
        fitting=tuple(fitting),
    )

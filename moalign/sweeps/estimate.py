"""What a sweep will cost, from a short probe of the real thing: `moalign sweep --dry-run`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from moalign.engine.train import train
from moalign.sweeps.candidate import batch_source, job_of
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import Plan
from moalign.sweeps.workshop import open_workshop
from moalign.types import Candidate

PROBE_STEPS = 4  # the first is warm-up and does not count


@dataclass(frozen=True)
class Estimate:
    """Seconds are of this machine; ``tokens`` are response tokens that are trained on, over all candidates."""

    candidates: tuple[Candidate, ...]
    steps: int
    tokens: int
    seconds_per_step: float
    seconds_per_evaluation: float
    counts: dict[str, int]

    @property
    def seconds(self) -> float:
        return len(self.candidates) * (self.steps * self.seconds_per_step + self.seconds_per_evaluation)


def estimate(plan: Plan, observer: Observer) -> Estimate:
    """Train a few throw-away steps of the first candidate, evaluate the base; write nothing.

    Rewards from frozen adapters (one forward pass each, kept for all candidates) are not in the estimate, because
    those adapters are not there yet.
    """
    candidates = plan.propose(())
    workshop = open_workshop(plan, Path(), observer, keep_cache=False)
    observer.on_phase("measuring a few steps")
    first = candidates[0]
    job = replace(
        job_of(first, workshop, ()),
        settings=plan.config.train.model_copy(update={"steps": PROBE_STEPS}),
    )
    times: list[float] = []
    tokens: list[int] = []

    def on_step(step: int, metrics: dict[str, Any]) -> None:
        times.append(time.perf_counter())
        tokens.append(metrics["tokens"])

    train(workshop.model, batch_source(first, workshop), job, workshop.cache, workshop.accelerator, on_step)
    per_step = median(after - before for before, after in pairwise(times))
    begin = time.perf_counter()
    workshop.evaluate(None)
    return Estimate(
        candidates=tuple(candidates),
        steps=plan.config.train.steps,
        tokens=round(median(tokens) * plan.config.train.steps * len(candidates)),
        seconds_per_step=per_step,
        seconds_per_evaluation=time.perf_counter() - begin,
        counts=dict(workshop.material.counts),
    )

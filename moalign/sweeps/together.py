"""Which candidates are trained together in one pass over the base, and how many of them pay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

from moalign import lora
from moalign.engine import memory
from moalign.engine.companions import companion_of
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.errors import ConfigError, UserError
from moalign.sweeps import comparing
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate

PROBE_STEPS = 3  # the first is warm-up and does not count
MEASURED_FROM = 30  # steps; in fewer the probe's own would take more time than the right size can save
BRIEFLY = 3.0  # seconds that the first tries may take if there are to be others
CLEARLY = 0.85  # of the time of one by one: times vary less than that
MEMORY_STEPS = 100  # at most so many steps are looked at for the largest pass
AS_GOOD = 1.05  # times the best: within the noise, and the larger size waits less often

Found = TypeVar("Found")


def groups(candidates: Sequence[Candidate], workshop: Workshop, size: int) -> list[list[Candidate]]:
    """At most ``size`` together, evenly; those whose adapters are others' rewards come before the others, and those of
    another seed, which are asked other prompts, after them.

    A function of what was proposed, never of what is finished already, so that a resumed run trains the same together.
    """
    stages: dict[tuple[bool, int], list[Candidate]] = {}
    for candidate in candidates:
        seed = workshop.plan.variant(candidate.changes).seed
        stages.setdefault((bool(workshop.implicit([candidate])), seed), []).append(candidate)
    made = []
    for _, stage in sorted(stages.items()):
        number = -(-len(stage) // size)
        ends = [len(stage) * (part + 1) // number for part in range(number)]
        made += [list(stage[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return made


def chosen_size(candidates: Sequence[Candidate], workshop: Workshop) -> tuple[int, dict[int, float]]:
    """How many are trained together: as configured or as measured, and the seconds per step and candidate, if measured.

    Raises ConfigError where the configuration wants several and they cannot share a pass.
    """
    configured = workshop.plan.config.train.together
    reason = lora.why_not_together(workshop.model.policy)
    if reason is None:
        return measured_size(candidates, workshop) if configured == "auto" else (configured, {})
    if configured not in ("auto", 1):
        raise ConfigError(f"train.together: {configured} candidates cannot share a pass: {reason}")
    return 1, {}


def measured_size(candidates: Sequence[Candidate], workshop: Workshop) -> tuple[int, dict[int, float]]:
    """How many candidates together take the least time for each, and the seconds per step and candidate found.

    In a run too short for measuring a rule of thumb decides between one and all, and no seconds are found. Else one and
    all of them are tried with throw-away steps, and where all are not clearly faster also half of them; where steps are
    short each again, because their times vary. A size that does not work, or for which the memory cannot suffice, is
    out.
    """
    trial = [candidate for candidate in candidates if not workshop.implicit([candidate])]
    sizes = _unless_it_fails(lambda: _sizes_with_room(trial, workshop), [1])
    seconds = dict.fromkeys(sizes, math.inf)
    if len(sizes) == 1:
        return 1, seconds
    if workshop.plan.config.train.steps < MEASURED_FROM:
        return (sizes[-1] if _unless_it_fails(lambda: _waits(trial[0], workshop), False) else 1), {}
    begin = time.monotonic()
    for size in (1, sizes[-1]):
        _try(size, trial, workshop, seconds)
    if seconds[sizes[-1]] > CLEARLY * seconds[1]:
        again = sizes if time.monotonic() - begin < BRIEFLY else sizes[1:-1]
        for size in again:
            _try(size, trial, workshop, seconds)
    best = min(seconds.values())
    fast = [size for size in sizes if math.isfinite(best) and seconds[size] <= AS_GOOD * best]
    return max(fast, default=1), seconds


def _unless_it_fails(work: Callable[[], Found], otherwise: Found) -> Found:
    """What the work finds; ``otherwise`` where it fails, which is a candidate's own error once that is trained."""
    try:
        return work()
    except UserError:
        raise
    except Exception:
        return otherwise


def _waits(candidate: Candidate, workshop: Workshop) -> bool:
    """Whether a pass of this candidate alone is so small that its overhead takes more time than its positions do."""
    model, settings = workshop.model, workshop.plan.variant(candidate.changes).train
    first = memory.passes(model, *batch_source(candidate, workshop).at(0), settings.tokens_per_pass)
    return sum(size.positions for size in first) <= model.packing.overhead * len(first)


def _sizes_with_room(trial: Sequence[Candidate], workshop: Workshop) -> list[int]:
    sizes = sorted({1, -(-len(trial) // 2), len(trial)} - {0})
    room = memory.available(workshop.model.device)
    if len(sizes) == 1 or room is None:
        return sizes
    _, needed = memory_of(trial, workshop, sizes)
    return [size for size in sizes if size == 1 or needed[size] <= room]


def _try(size: int, trial: Sequence[Candidate], workshop: Workshop, seconds: dict[int, float]) -> None:
    """Note the time of this size if it is the best so far; infinite where it does not work."""
    try:
        seconds[size] = min(seconds[size], seconds_per_candidate(trial[:size], workshop))
    except UserError:
        raise
    except Exception:  # memory, or a layer whose rows do not stay together: the training will say why
        seconds[size] = math.inf


def memory_of(
    candidates: Sequence[Candidate], workshop: Workshop, numbers: Sequence[int]
) -> tuple[int, dict[int, int]]:
    """Bytes of the base, and what so many of these together take beyond it at the most.

    Looks at steps spread over the training; of rollouts only the first round is known before.
    """
    settings = workshop.plan.config.train
    source = batch_source(candidates[0], workshop)
    steps = range(0, settings.steps, -(-settings.steps // MEMORY_STEPS)) if source.cacheable else range(1)
    entropy = any("entropy" in workshop.plan.needs(candidate) for candidate in candidates)
    trained = 1 if companion_of(workshop.plan.objective) is None else 2  # adapters for each candidate
    formula = memory.measure(workshop.model, settings.gradient_checkpointing, entropy)
    sizes = [memory.passes(workshop.model, *source.at(step), settings.tokens_per_pass) for step in steps]

    def beyond(number: int, each: list[memory.PassSize]) -> int:
        own = memory.of_loss(workshop.plan.objective, workshop.model, number, each)
        kept = 4 * formula.adapter * number if settings.posterior else 0  # two moments of its weights, in float64
        kept += int(formula.adapter * number * comparing.adapters_kept(workshop.plan))
        if workshop.plan.weighs_losses:  # a gradient of each objective
            kept += len(workshop.plan.objectives) * formula.adapter * number
        return formula.training(number * trained, each) - formula.base + own + kept

    return formula.base, {number: max(beyond(number, each) for each in sizes) for number in numbers}


def seconds_per_candidate(candidates: Sequence[Candidate], workshop: Workshop) -> float:
    """Of a step of these together, by throw-away steps."""
    times: list[float] = []
    first = candidates[0].id

    def on_step(step: int, metrics: dict[str, Any]) -> None:
        times.append(time.perf_counter())

    def ignore(step: int, metrics: dict[str, Any]) -> None: ...

    trainees = []
    for candidate, slot in zip(candidates, slots(len(candidates)), strict=True):
        job = job_of(candidate, workshop, ())
        job = replace(job, settings=job.settings.model_copy(update={"steps": PROBE_STEPS, "early_stop": None}))
        watch = on_step if candidate.id == first else ignore
        trainees.append(Trainee(job, batch_source(candidate, workshop, slot), slot, watch))
    train_together(workshop.model, trainees, workshop.cache, workshop.accelerator)
    if any(trainee.error for trainee in trainees):
        return math.inf  # the training proper will say why
    return min(after - before for before, after in pairwise(times)) / len(candidates)

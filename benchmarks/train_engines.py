"""moalign's engine and TRL's DPOTrainer on one task, each in its own process, stepping when it is told to."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from random import Random
from typing import Any, cast

from benchmarks.train_setup import (
    Assignment,
    check_ids,
    make_quiet,
    open_workshop,
    pairs_of_steps,
    texts_of,
    tokens_of,
    trl_settings,
    trl_trainer,
)
from benchmarks.train_task import Task

OBJECTIVES = ("better",)


@dataclass
class Stepper:
    """The engine's side of the alternation: waits for the word before each step, and answers with its seconds."""

    connection: Connection
    assignment: Assignment
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    _start: float = 0.0
    _done: int = 0
    _profiler: Any = None

    def wait(self) -> None:
        self.connection.recv()
        if self.assignment.profile and self._done == self.assignment.task.warmup:
            from torch.profiler import ProfilerActivity, profile

            gpu = [ProfilerActivity.CUDA] if self.assignment.device != "cpu" else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profiler.__enter__()
        self._synchronise()
        self._start = time.perf_counter()

    def step_done(self) -> None:
        self._synchronise()
        self.connection.send(("step", time.perf_counter() - self._start))
        self._done += 1
        if self._done < self.assignment.task.all_steps:
            self.wait()

    def finish(self, settings: dict[str, Any], tokens: list[int]) -> None:
        """``tokens`` of each step: prompts and responses of both sides of every pair, without padding."""
        table = None
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            table = self._profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
        unit = 1 if sys.platform == "darwin" else 1024
        result = {
            "losses": self.losses,
            "norms": self.norms,
            "tokens": tokens,
            "settings": settings,
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "profile": table,
        }
        self.connection.send(("result", result))

    def _synchronise(self) -> None:
        if self.assignment.device != "cpu":
            import torch

            torch.cuda.synchronize()


def work(assignment: Assignment, connection: Connection) -> None:
    """The child process."""
    make_quiet(assignment)
    ENGINES[assignment.engine](assignment, Stepper(connection, assignment))


def _moalign(assignment: Assignment, stepper: Stepper) -> None:
    from moalign.engine.train import train
    from moalign.sweeps.candidate import batch_source, job_of
    from moalign.types import Candidate, Preference

    workshop = open_workshop(assignment, OBJECTIVES)
    candidate = Candidate("better", Preference("weights", {"better": 1.0}))
    job = job_of(candidate, workshop, ())

    def run(on_step: Callable[[int, dict[str, Any]], None]) -> None:
        source = batch_source(candidate, workshop)
        train(workshop.model, source, job, workshop.cache, workshop.accelerator, on_step)

    run(lambda step, metrics: None)  # fills the cache of reference log-probabilities; training begins anew after it

    def on_step(step: int, metrics: dict[str, Any]) -> None:
        stepper.losses.append(metrics["loss"])
        stepper.norms.append(metrics["gradient_norm"])
        stepper.step_done()

    stepper.connection.send(("ready", None))
    stepper.wait()
    run(on_step)
    tokens = [tokens_of(pairs) for pairs in pairs_of_steps(assignment, workshop)]
    stepper.finish({"engine": "defaults", "reference": "cached"}, tokens)


def _trl(assignment: Assignment, stepper: Stepper) -> None:
    _train_with_trl(assignment, stepper, grouped=False)


def _trl_grouped(assignment: Assignment, stepper: Stepper) -> None:
    _train_with_trl(assignment, stepper, grouped=True)


def _train_with_trl(assignment: Assignment, stepper: Stepper, *, grouped: bool) -> None:
    """The same pairs in the same order; ``grouped``: batches of pairs of similar length, in random order."""
    from peft import PeftModel
    from transformers import TrainerCallback

    from moalign import lora
    from moalign.seeds import derive

    task = assignment.task
    steps = pairs_of_steps(assignment, open_workshop(assignment, OBJECTIVES))
    if grouped:
        steps = _grouped(steps, task)
    settings = trl_settings(assignment, task.all_steps)

    class Steps(TrainerCallback):
        """Announces the end of every step; asks for the loss to be logged in the steps that do not count."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                stepper.connection.send(("ready", None))
                stepper.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_log = state.global_step <= task.warmup
            stepper.step_done()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                stepper.losses.append(float(logs["loss"]))
                stepper.norms.append(float(logs["grad_norm"]))

    pairs = [pair for step in steps for pair in step]
    trainer = trl_trainer(assignment, settings, texts_of(assignment, pairs), Steps())
    check_ids(trainer.train_dataset, pairs)
    lora.initialise(
        cast(PeftModel, trainer.model), "default", derive(task.seed, "adapter")
    )  # the same start as moalign's
    trainer.train()
    stepper.finish(settings, [tokens_of(pairs) for pairs in steps])


def _grouped(steps: list[list[tuple[Any, Any]]], task: Task) -> list[list[tuple[Any, Any]]]:
    """What transformers' group_by_length does, exactly so among the steps that are timed."""
    ordered = sorted(
        (pair for pairs in steps[task.warmup :] for pair in pairs), key=lambda pair: max(len(s.ids) for s in pair)
    )
    batches = [ordered[at : at + task.pairs_per_step] for at in range(0, len(ordered), task.pairs_per_step)]
    Random(task.seed).shuffle(batches)
    return steps[: task.warmup] + batches


def same_loss(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Why two engines do not optimise the same thing; None where losses and gradient norms agree to 1e-4."""
    for name in ("losses", "norms"):
        pairs = list(zip(ours[name], theirs[name], strict=False))
        if not pairs:
            return f"no {name} to compare"
        for step, (a, b) in enumerate(pairs):
            if not math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4):
                return f"{name} of step {step} differ: {a:.6g} and {b:.6g}"
    return None


TRL_GROUPED = "TRL, grouped by length"
ENGINES: dict[str, Callable[[Assignment, Stepper], None]] = {
    "moalign": _moalign,
    "TRL": _trl,
    TRL_GROUPED: _trl_grouped,
}

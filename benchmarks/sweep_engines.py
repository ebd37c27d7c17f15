"""A sweep of K candidates, each way in a process of its own: moalign in one pass or one by one, TRL run K times."""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from benchmarks import measure
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
from benchmarks.train_task import Task, write_model, write_pairs

OBJECTIVES = ("first", "second")
CHECKED_STEPS = 3  # of a run that does not count: it warms up, and its losses are compared
HELD_OUT = 2


def write(task: Task, directory: Path) -> None:
    """Model and pairs; the two objectives judge in turn."""
    write_model(task, directory / "model")
    everything = directory / "everything.jsonl"
    write_pairs(replace(task, steps=task.steps + HELD_OUT), everything, directory / "unused.jsonl")
    rows = [json.loads(line) for line in everything.read_text().splitlines()]
    lines = [json.dumps(row | {"objective": OBJECTIVES[number % 2]}) + "\n" for number, row in enumerate(rows)]
    wanted = task.pairs_per_step * task.all_steps
    (directory / "training.jsonl").write_text("".join(lines[:wanted]))
    (directory / "held_out.jsonl").write_text("".join(lines[wanted : wanted + HELD_OUT]))


def work(assignment: Assignment, connection: Connection) -> None:
    """The child process: says what it took to get ready, then trains as many candidates as it is told, again and again.

    For moalign the numbers must not decrease: peak memory is the process's own high-water mark.
    """
    make_quiet(assignment)
    import torch

    engine = WAYS[assignment.engine](assignment)
    connection.send(("ready", engine.ready))
    while True:
        try:
            number = connection.recv()
        except EOFError:  # nothing more is wanted
            return
        connection.send(("trained", engine.train(number) | {"peak_bytes": _peak(torch.device(assignment.device))}))


def _peak(device: Any) -> int:
    """Bytes: on a GPU as its allocator counts them, else resident memory, libraries and loading among it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Seconds since it was made, or since it was last read."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = torch.device(device)
        measure.synchronise(self.device)
        self.last = time.perf_counter()

    def lap(self) -> float:
        measure.synchronise(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


class Moalign:
    """``size`` candidates in a pass (None: all, "auto": as measured); model, data and reference are read once."""

    def __init__(self, assignment: Assignment, size: int | str | None) -> None:
        self.assignment, self.size = assignment, size
        open_workshop(assignment, OBJECTIVES)  # imports, and files into the system's cache, as for TRL
        gc.collect()
        clock = Clock(assignment.device)
        self.workshop = open_workshop(assignment, OBJECTIVES)
        self.ready: dict[str, Any] = {"loading": clock.lap()}
        self._reference()
        self.ready["reference"] = clock.lap()
        steps = pairs_of_steps(assignment, self.workshop)
        self.ready["tokens"] = sum(tokens_of(pairs) for pairs in steps)
        self._slots_seconds = 0.0
        self._warm = 0

    def train(self, number: int) -> dict[str, Any]:
        """Seconds of training alone, and with all that comes after loading; losses at equal weights."""
        from moalign import lora
        from moalign.sweeps import together
        from moalign.sweeps.candidate import slots

        candidates = candidates_of(number)
        size = 1 if self.size == 1 else number
        clock = Clock(self.assignment.device)
        lora.add_slots(self.workshop.model.policy, slots(size))
        self._slots_seconds += clock.lap()  # those of smaller numbers are there already
        losses: list[float] = []
        if self._warm < size:
            losses = self._run([candidates if size > 1 else candidates_of(1)], CHECKED_STEPS)
            self._warm = size
        clock.lap()
        seconds: dict[int, float] = {}
        if self.size == "auto":
            size, seconds = together.measured_size(candidates, self.workshop)
        measuring = clock.lap()
        self._run(together.groups(candidates, self.workshop, size), self.assignment.task.all_steps)
        training = clock.lap()
        return {
            "seconds": training,
            "total": self._slots_seconds + measuring + training,
            "size": size,
            "measuring": measuring,
            "measured": {str(tried): found for tried, found in seconds.items()},
            "losses": losses,
        }

    def _run(self, groups: Sequence[Sequence[Any]], steps: int) -> list[float]:
        from moalign.engine.train import train_together
        from moalign.engine.trainee import Trainee
        from moalign.sweeps.candidate import batch_source, job_of, slots

        losses: list[float] = []

        def note(step: int, metrics: dict[str, Any]) -> None:
            losses.append(2 * metrics["loss"])  # each pair counts half

        def ignore(step: int, metrics: dict[str, Any]) -> None: ...

        for group in groups:
            trainees = []
            for candidate, slot in zip(group, slots(len(group)), strict=True):
                job = job_of(candidate, self.workshop, ())
                job = replace(job, settings=job.settings.model_copy(update={"steps": steps}))
                watch = note if job.preference[0] == job.preference[1] else ignore
                trainees.append(Trainee(job, batch_source(candidate, self.workshop, slot), slot, watch))
            train_together(self.workshop.model, trainees, self.workshop.cache, self.workshop.accelerator)
            for trainee in trainees:
                _ = trainee.result  # raises where a candidate has failed: its time would mean nothing
        return losses

    def _reference(self) -> None:
        """What training would compute in its first steps, so that it can be timed apart."""
        from moalign.engine.layout import lay_out
        from moalign.engine.passes import pair_passes
        from moalign.sweeps.candidate import batch_source

        model = self.workshop.model
        source = batch_source(candidates_of(1)[0], self.workshop)
        for step in range(self.assignment.task.all_steps):
            dataset, pairs = source.at(step)
            for part in pair_passes(dataset, pairs, model.packing):
                sequences = [dataset.sequences[index] for index in part.sequences]
                layout = lay_out(sequences, part.rows, model.pad_id, model.packing.multiple).to(model.device)
                self.workshop.cache.logps(sequences, layout, None, "")


def candidates_of(number: int) -> list[Any]:
    """Evenly spread weights, both ends among them; one alone weighs both objectives alike."""
    from moalign.types import Candidate, Preference

    shares = [place / (number - 1) for place in range(number)] if number > 1 else [0.5]
    values = [dict(zip(OBJECTIVES, (share, 1 - share), strict=True)) for share in shares]
    return [Candidate(f"c{place}", Preference("weights", each)) for place, each in enumerate(values)]


class Trl:
    """Each candidate a run of its own: the base is loaded, the reference precomputed, DPOTrainer trains."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        steps = pairs_of_steps(assignment, open_workshop(assignment, OBJECTIVES))
        self.pairs = [pair for pairs in steps for pair in pairs]
        self.texts = texts_of(assignment, self.pairs)
        self.ready: dict[str, Any] = {"tokens": sum(tokens_of(pairs) for pairs in steps)}
        self.settings: dict[str, Any] = {}
        self.losses = self._run(CHECKED_STEPS, check=True)["losses"]

    def train(self, number: int) -> dict[str, Any]:
        """One run more (``number`` is 1): a process that lives on, so that imports are no part of it."""
        return self._run(self.assignment.task.all_steps, check=False) | {
            "losses": self.losses,
            "settings": self.settings,
        }

    def _run(self, max_steps: int, *, check: bool) -> dict[str, Any]:
        from peft import PeftModel
        from transformers import TrainerCallback

        from moalign import lora
        from moalign.seeds import derive

        gc.collect()  # the trainer before is a cycle
        # moalign's losses, with which these are compared, count half, and so do its gradients before clipping
        self.settings = trl_settings(self.assignment, max_steps, 2.0 if check else 1.0)
        found: dict[str, Any] = {"losses": []}

        class Watch(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.lap()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_log = check

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if logs and "loss" in logs:
                    found["losses"].append(float(logs["loss"]))

            def on_train_end(self, *_: Any, **__: Any) -> None:
                found["seconds"] = clock.lap()

        clock, whole = Clock(self.assignment.device), Clock(self.assignment.device)
        trainer = trl_trainer(self.assignment, self.settings, self.texts, Watch())
        if check:
            check_ids(trainer.train_dataset, self.pairs)
            lora.initialise(cast(PeftModel, trainer.model), "default", derive(self.assignment.task.seed, "adapter"))
        trainer.train()
        return found | {"total": whole.lap()}


ONE_PASS, AUTO, ONE_BY_ONE, TRL = "one pass", "auto", "one by one", "TRL"
WAYS: dict[str, Callable[[Assignment], Moalign | Trl]] = {
    ONE_PASS: lambda assignment: Moalign(assignment, None),
    AUTO: lambda assignment: Moalign(assignment, "auto"),
    ONE_BY_ONE: lambda assignment: Moalign(assignment, 1),
    TRL: Trl,
}

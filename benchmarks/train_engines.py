"""moalign's engine and TRL's DPOTrainer on one task, each in its own process, stepping when it is told to."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, cast

from benchmarks.train_task import Task


@dataclass(frozen=True)
class Assignment:
    """``engine``: a name of ``ENGINES``. ``directory`` holds model/, training.jsonl and held_out.jsonl."""

    engine: str
    task: Task
    directory: str
    device: str
    threads: int | None
    profile: bool


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
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["HF_HOME"] = str(Path(assignment.directory) / "cache")  # TRL keeps its reference log-probabilities there
    if assignment.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import datasets  # type: ignore[import-untyped]
    import torch
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if assignment.threads:
        torch.set_num_threads(assignment.threads)
    ENGINES[assignment.engine](assignment, Stepper(connection, assignment))


def _workshop(assignment: Assignment) -> Any:
    """Model and pairs as a sweep opens them."""
    from moalign import config, registry
    from moalign.sweeps.observe import Observer
    from moalign.sweeps.plan import prepare
    from moalign.sweeps.workshop import open_workshop

    task, folder = assignment.task, Path(assignment.directory)
    content = {
        "model": {
            "path": str(folder / "model"),
            "dtype": task.dtype,
            "lora": {"r": task.rank, "alpha": 2 * task.rank, "targets": "all-linear"},
        },
        "objectives": {"better": None},
        "data": {
            "path": str(folder / "training.jsonl"),
            "held_out_path": str(folder / "held_out.jsonl"),
            "max_length": task.longest + 128,
        },
        "loss": {"name": "dpo", "beta": task.beta},
        "search": {"name": "grid", "points": 1},
        "train": {
            "steps": task.all_steps,
            "pairs_per_step": task.pairs_per_step,
            "lr": task.lr,
            "warmup": 0,
            "schedule": "constant",
        },
        "seed": task.seed,
    }
    return open_workshop(
        prepare(config.from_mapping(content), registry.discover()), folder, Observer(), keep_cache=False
    )


def _pairs_of_steps(assignment: Assignment, workshop: Any) -> list[list[tuple[Any, Any]]]:
    """For every step, its pairs of sequences (chosen, rejected), as moalign's own rule draws them."""
    from moalign.data.batching import pair_indices

    task, dataset = assignment.task, workshop.material.train
    steps = [pair_indices(dataset, task.seed, step, task.pairs_per_step) for step in range(task.all_steps)]
    return [
        [(dataset.sequences[chosen], dataset.sequences[rejected]) for chosen, rejected in dataset.pairs[indices]]
        for indices in steps
    ]


def _tokens(pairs: list[tuple[Any, Any]]) -> int:
    return sum(len(sequence.ids) for pair in pairs for sequence in pair)


def _moalign(assignment: Assignment, stepper: Stepper) -> None:
    from moalign.engine.train import train
    from moalign.sweeps.candidate import batch_source, job_of
    from moalign.types import Candidate, Preference

    workshop = _workshop(assignment)
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
    tokens = [_tokens(pairs) for pairs in _pairs_of_steps(assignment, workshop)]
    stepper.finish({"engine": "defaults", "reference": "cached"}, tokens)


def _trl(assignment: Assignment, stepper: Stepper) -> None:
    _train_with_trl(assignment, stepper, grouped=False)


def _trl_grouped(assignment: Assignment, stepper: Stepper) -> None:
    _train_with_trl(assignment, stepper, grouped=True)


def _train_with_trl(assignment: Assignment, stepper: Stepper, *, grouped: bool) -> None:
    """The same pairs in the same order; ``grouped``: batches of pairs of similar length, in random order."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from moalign import lora
    from moalign.seeds import derive

    task, folder = assignment.task, Path(assignment.directory)
    steps = _pairs_of_steps(assignment, _workshop(assignment))
    if grouped:
        steps = _grouped(steps, task)
    on_gpu = assignment.device != "cpu"
    settings = {
        "per_device_train_batch_size": task.pairs_per_step,
        "max_steps": task.all_steps,
        "train_sampling_strategy": "sequential",
        "precompute_ref_log_probs": True,
        "beta": task.beta,
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": task.dtype == "bfloat16",
        "use_liger_kernel": on_gpu,
        "use_cpu": not on_gpu,
    }
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=task.seed,
        **settings,  # type: ignore[arg-type]
    )

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

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, task.dtype)),
        args=arguments,
        train_dataset=Dataset.from_list([_texts(tokenizer, pair) for pairs in steps for pair in pairs]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=task.rank, lora_alpha=2 * task.rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        ),
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    _check_ids(trainer.train_dataset, [pair for pairs in steps for pair in pairs])
    lora.initialise(
        cast(PeftModel, trainer.model), "default", derive(task.seed, "adapter")
    )  # the same start as moalign's
    trainer.train()
    stepper.finish(settings, [_tokens(pairs) for pairs in steps])


def _grouped(steps: list[list[tuple[Any, Any]]], task: Task) -> list[list[tuple[Any, Any]]]:
    """What transformers' group_by_length does, exactly so among the steps that are timed."""
    ordered = sorted(
        (pair for pairs in steps[task.warmup :] for pair in pairs), key=lambda pair: max(len(s.ids) for s in pair)
    )
    batches = [ordered[at : at + task.pairs_per_step] for at in range(0, len(ordered), task.pairs_per_step)]
    Random(task.seed).shuffle(batches)
    return steps[: task.warmup] + batches


def _texts(tokenizer: Any, pair: tuple[Any, Any]) -> dict[str, str]:
    chosen, rejected = pair

    def text(ids: Any) -> str:
        return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))

    return {
        "prompt": text(chosen.ids[: chosen.prompt_length]) + " ",
        "chosen": text(chosen.ids[chosen.prompt_length : -1]),
        "rejected": text(rejected.ids[rejected.prompt_length : -1]),
    }


def _check_ids(dataset: Any, pairs: list[tuple[Any, Any]]) -> None:
    for row, (chosen, rejected) in zip(dataset, pairs, strict=True):
        for name, sequence in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            if tuple(row["prompt_ids"]) + tuple(row[name]) != tuple(sequence.ids):
                raise RuntimeError("the two engines do not train on the same tokens")


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

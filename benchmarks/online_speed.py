"""Samples per second of online training, each engine in a process of its own: moalign's loop and TRL's GRPOTrainer."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.online_run import BETA, FIRST, Request, open_workshop, plan_of, run_group, why_not

MAX_NEW_TOKENS = 20
LR = 1e-4  # so small that all go on saying what the base says, and are timed on the same work
ONE, FIVE, TRL = "moalign", "moalign, 5 in one pass", "TRL"
ENGINES = (ONE, FIVE, TRL)


@dataclass(frozen=True)
class Work:
    """``prompts`` x ``samples`` responses and one update on all of them, ``steps`` times; the first does not count."""

    engine: str
    prompts: int
    samples: int
    steps: int
    threads: int | None = None


def work(task: Work, connection: Connection) -> None:
    """The child process: after every message it trains once more and says what that took."""
    import torch

    from benchmarks.train_setup import Assignment, make_quiet
    from benchmarks.train_task import Task

    with tempfile.TemporaryDirectory(prefix="moalign-online-") as directory:
        make_quiet(Assignment("", Task("", 0), directory, "cpu", task.threads, profile=False))
        train = (_trl if task.engine == TRL else _moalign)(task, Path(directory))
        connection.send(("ready", torch.get_num_threads()))
        while True:
            try:
                connection.recv()
            except EOFError:  # nothing more is wanted
                return
            gc.collect()
            connection.send(("trained", train()))


def _result(task: Work, candidates: int, times: Sequence[float], tokens: int) -> dict[str, Any]:
    """``times`` after each step; ``tokens``: of all responses."""
    rounds = task.prompts * task.samples * candidates
    return {
        "samples_per_second": rounds * (len(times) - 1) / (times[-1] - times[0]),
        "tokens_per_sample": tokens / (rounds * len(times)),
    }


def _moalign(task: Work, directory: Path) -> Callable[[], dict[str, Any]]:
    """GRPO where it is installed, else RLOO, which does the same passes."""
    from moalign import registry

    loss = "rloo" if why_not("fixed weights", "grpo", registry.discover()) else "grpo"
    points = 5 if task.engine == FIVE else 2
    changes = (
        f"rollouts.prompts={task.prompts}",
        f"rollouts.prompts_per_step={task.prompts}",
        f"rollouts.samples={task.samples}",
        f"rollouts.max_new_tokens={MAX_NEW_TOKENS}",
        f"search.points={points}",
        f"train.lr={LR}",
        f"loss.beta={BETA}",
    )
    plan = plan_of(Request(FIRST, "fixed weights", loss, 0, task.steps, 1, changes).settings())
    workshop = open_workshop(plan, directory)
    candidates = plan.propose([])[: 5 if task.engine == FIVE else 1]

    def train() -> dict[str, Any]:
        times: list[float] = []
        trained: list[int] = []

        def on_step(step: int, trainees: Sequence[Any]) -> None:
            times.append(time.perf_counter())
            trained[:] = [trainee.tokens for trainee in trainees]

        run_group(workshop, candidates, on_step)
        return _result(task, len(candidates), times, sum(trained)) | {"loss": loss}

    return train


def _trl(task: Work, directory: Path) -> Callable[[], dict[str, Any]]:
    """GRPOTrainer as a user would set it up: the same prompts, rewards, adapters, KL and one update a round."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from moalign.demo import ceiling, grammar

    settings: dict[str, Any] = {
        "per_device_train_batch_size": task.prompts * task.samples,
        "num_generations": task.samples,
        "steps_per_generation": 1,
        "num_iterations": 1,
        "max_steps": task.steps,
        "max_completion_length": MAX_NEW_TOKENS,
        "beta": BETA,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "gradient_checkpointing": False,
        "reward_weights": [0.5, 0.5, 0.0],  # the last one only counts tokens
        "bf16": False,
        "use_cpu": True,
    }
    rows = Dataset.from_list([{"prompt": prompt} for prompt in grammar.TRAIN_PROMPTS])

    def judge(objective: str) -> Callable[..., list[float | None]]:
        def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float | None]:
            pairs = zip(prompts, completions, strict=True)
            return [grammar.score(prompt, completion)[objective] for prompt, completion in pairs]

        reward.__name__ = objective
        return reward

    def train() -> dict[str, Any]:
        times: list[float] = []

        class Watch(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append(time.perf_counter())

        tokens: list[int] = []

        def counting(prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
            tokens.append(sum(map(len, completion_ids)))
            return [0.0] * len(prompts)

        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(ceiling.MODEL_DIRECTORY),
            reward_funcs=[judge("helpful"), judge("harmless"), counting],
            args=GRPOConfig(
                output_dir=str(directory / "trl"),
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=0,
                **settings,
            ),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(ceiling.MODEL_DIRECTORY, padding_side="left"),
            peft_config=LoraConfig(
                r=ceiling.RANK, lora_alpha=ceiling.ALPHA, target_modules=ceiling.TARGETS, task_type="CAUSAL_LM"
            ),
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return _result(task, 1, times, sum(tokens)) | {"settings": settings}

    return train

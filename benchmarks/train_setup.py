"""What the training benchmarks set up alike: the child process, moalign's workshop, TRL's trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def make_quiet(assignment: Assignment) -> None:
    """Offline, without progress bars and warnings, on as many threads as wanted; before anything else is imported."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["HF_HOME"] = str(Path(assignment.directory) / "cache")  # TRL keeps its reference log-probabilities there
    if assignment.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import datasets
    import torch
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if assignment.threads:
        torch.set_num_threads(assignment.threads)


def open_workshop(assignment: Assignment, objectives: Sequence[str]) -> Any:
    """Model and pairs as a sweep opens them."""
    from moalign import config, registry
    from moalign.sweeps import workshop
    from moalign.sweeps.observe import Observer
    from moalign.sweeps.plan import prepare

    task, folder = assignment.task, Path(assignment.directory)
    content = {
        "model": {
            "path": str(folder / "model"),
            "dtype": task.dtype,
            "lora": {"r": task.rank, "alpha": 2 * task.rank, "targets": "all-linear", "layers": task.adapted},
        },
        "objectives": dict.fromkeys(objectives),
        "data": {
            "path": str(folder / "training.jsonl"),
            "held_out_path": str(folder / "held_out.jsonl"),
            "max_length": task.longest + 128,
        },
        "loss": {"name": "dpo", "beta": task.beta},
        "search": {"name": "grid", "points": len(objectives)},
        "train": {
            "steps": task.all_steps,
            "pairs_per_step": task.pairs_per_step,
            "lr": task.lr,
            "warmup": 0,
            "schedule": "constant",
        },
        "seed": task.seed,
    }
    return workshop.open_workshop(
        prepare(config.from_mapping(content), registry.discover()), folder, Observer(), keep_cache=False
    )


def pairs_of_steps(assignment: Assignment, workshop: Any) -> list[list[tuple[Any, Any]]]:
    """For every step, its pairs of sequences (chosen, rejected), as moalign's own rule draws them."""
    from moalign.data.batching import pair_indices

    task, dataset = assignment.task, workshop.material.train
    steps = [pair_indices(dataset, task.seed, step, task.pairs_per_step) for step in range(task.all_steps)]
    return [
        [(dataset.sequences[chosen], dataset.sequences[rejected]) for chosen, rejected in dataset.pairs[indices]]
        for indices in steps
    ]


def tokens_of(pairs: list[tuple[Any, Any]]) -> int:
    return sum(len(sequence.ids) for pair in pairs for sequence in pair)


def trl_settings(assignment: Assignment, max_steps: int, max_gradient_norm: float = 1.0) -> dict[str, Any]:
    """Without gradient checkpointing and dropout, in the model's precision; Liger's layers where they run."""
    task, on_gpu = assignment.task, assignment.device != "cpu"
    return {
        "per_device_train_batch_size": task.pairs_per_step,
        "max_steps": max_steps,
        "train_sampling_strategy": "sequential",
        "precompute_ref_log_probs": True,
        "beta": task.beta,
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": max_gradient_norm,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": task.dtype == "bfloat16",
        "use_liger_kernel": on_gpu,
        "use_cpu": not on_gpu,
    }


def trl_trainer(assignment: Assignment, settings: Mapping[str, Any], rows: list[dict[str, str]], callback: Any) -> Any:
    """DPOTrainer on a freshly loaded base, saying nothing by itself."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    task, folder = assignment.task, Path(assignment.directory)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, task.dtype)),
        args=DPOConfig(
            output_dir=str(folder / "trl"),
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=task.seed,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(
            r=task.rank, lora_alpha=2 * task.rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        ),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def texts_of(assignment: Assignment, pairs: Sequence[tuple[Any, Any]]) -> list[dict[str, str]]:
    """Rows for TRL, which makes the same ids of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(assignment.directory) / "model")
    return [_texts(tokenizer, *pair) for pair in pairs]


def _texts(tokenizer: Any, chosen: Any, rejected: Any) -> dict[str, str]:

    def text(ids: Any) -> str:
        return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))

    return {
        "prompt": text(chosen.ids[: chosen.prompt_length]) + " ",
        "chosen": text(chosen.ids[chosen.prompt_length : -1]),
        "rejected": text(rejected.ids[rejected.prompt_length : -1]),
    }


def check_ids(dataset: Any, pairs: list[tuple[Any, Any]]) -> None:
    for row, (chosen, rejected) in zip(dataset, pairs, strict=True):
        for name, sequence in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            if tuple(row["prompt_ids"]) + tuple(row[name]) != tuple(sequence.ids):
                raise RuntimeError("the two engines do not train on the same tokens")

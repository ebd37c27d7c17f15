"""The same preference pairs for moalign and for TRL, and the front that TRL's DPOTrainer reaches, run K times."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.front_ways import TRL, Request, run_sweep
from benchmarks.train_setup import Assignment, trl_settings, trl_trainer
from benchmarks.train_task import Task
from moalign.config import Config
from moalign.seeds import derive

PROMPTS, RESPONSES = 40, 8  # all pairs among a prompt's responses
HELD_OUT_RESPONSES = 2  # moalign wants held-out pairs; nothing here looks at them


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, and which one the judge of each objective chose."""

    prompt: str
    responses: tuple[str, str]
    chosen: dict[str, int]

    def row(self, objective: str) -> dict[str, str]:
        chosen = self.chosen[objective]
        return {"prompt": self.prompt, "chosen": self.responses[chosen], "rejected": self.responses[1 - chosen]}


def reached(request: Request, directory: Path) -> dict[str, Any]:
    """The front of one way, from pairs that are the same for all ways of a seed."""
    settings = request.settings()
    if request.way == TRL:
        return run_trl(settings, training_pairs(settings), directory)
    return run_sweep(request.settings(*write_pairs(settings, directory)))


def training_pairs(settings: Config) -> list[Pair]:
    """Judged pairs of some of the training prompts; a function of the configuration's seed."""
    from moalign.demo import grammar

    some = Random(derive(settings.seed, "prompts")).sample(grammar.TRAIN_PROMPTS, PROMPTS)
    return judged(settings, some, RESPONSES, derive(settings.seed, "training"))


def write_pairs(settings: Config, directory: Path) -> tuple[str, ...]:
    """Write training and held-out pairs; returns the changes that name the two files."""
    from moalign.demo import grammar

    held_out = judged(settings, grammar.HELD_OUT_PROMPTS, HELD_OUT_RESPONSES, derive(settings.seed, "held out"))
    for name, pairs in (("training", training_pairs(settings)), ("held-out", held_out)):
        rows = [pair.row(each) | {"objective": each} for pair in pairs for each in settings.objective_names]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (f"data.path={directory}/training.jsonl", f"data.held_out_path={directory}/held-out.jsonl")


def judged(settings: Config, prompts: Sequence[str], responses: int, seed: int) -> list[Pair]:
    """All pairs among responses sampled from the base, but those of the same text; a function of ``seed``.

    The judge of objective j chooses a over b with probability sigmoid((r_j(a) - r_j(b)) beta / B), with B the price of
    KL in the world and beta the loss's. DPO's optimum for one objective alone is then the world's own (2305.18290).
    """
    from moalign.demo import grammar
    from moalign.demo.world import BETA

    texts = sampled(settings, prompts, responses, seed)
    sharpness, rng = settings.loss.options["beta"] / BETA, Random(seed)
    pairs = []
    for prompt, answers in zip(prompts, texts, strict=True):
        for two in combinations(answers, 2):
            first, second = (grammar.score(prompt, text) for text in two)
            draws = {name: rng.random() for name in settings.objective_names}
            chosen = {
                name: int(draw >= 1 / (1 + math.exp((second[name] - first[name]) * sharpness)))
                for name, draw in draws.items()
            }
            if two[0] != two[1]:
                pairs.append(Pair(prompt, two, chosen))
    return pairs


def sampled(settings: Config, prompts: Sequence[str], responses: int, seed: int) -> list[list[str]]:
    """So many responses of the base to each prompt; a function of ``seed``."""
    import torch

    from moalign.engine import model as models
    from moalign.engine.rollouts import sample

    model = models.load(settings.model_directory, settings.model, torch.device("cpu"))
    ids = [tuple(model.tokeniser.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    (rollouts,) = sample(model, [None], ids, samples=responses, temperature=1.0, max_new_tokens=20, seed=seed)
    texts: list[list[str]] = [[] for _ in prompts]
    for rollout in rollouts:
        texts[rollout.prompt].append(rollout.text)
    return texts


def run_trl(settings: Config, pairs: Sequence[Pair], directory: Path) -> dict[str, Any]:
    """DPOTrainer for each preference, its adapter written and read by peft, and measured as moalign's are."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moalign.demo import world as worlds
    from moalign.demo.enumeration import enumerate_replies, reply_logps

    (directory / "model").symlink_to(settings.model_directory)
    world = worlds.tiny_world(objectives=settings.objective_names)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)

    replies = enumerate_replies(AutoTokenizer.from_pretrained(directory / "model"), world.prompts)
    with torch.no_grad():
        reference = reply_logps(base(), replies)
    points, values = [], []
    number = settings.search.options["points"]
    for place in range(number):
        weights = (place / (number - 1), 1 - place / (number - 1))
        name = "w-" + "-".join(f"{weight:.2f}" for weight in weights)
        tokens = train_with_trl(settings, pairs, weights, directory, directory / name)
        with torch.no_grad():
            policy = PeftModel.from_pretrained(base(), str(directory / name))
            value = worlds.evaluate(world, reply_logps(policy, replies), reference)
        scores = dict(zip(world.objectives, value.f.tolist(), strict=True))
        points.append({"id": name, "kind": "trained", "tokens": tokens, "scores": scores, "kl": value.kl})
        values.append(value.f)
    shares = worlds.shares(world, reference, torch.stack(values))
    return {
        "front_share": shares.front_share,
        "front_share_worst": shares.front_share_worst,
        "hypervolume_share": shares.hypervolume_share,
        "tokens": sum(point["tokens"] for point in points),
        "points": points,
        "seconds": None,
        "step_seconds": None,
    }


def train_with_trl(
    settings: Config, pairs: Sequence[Pair], weights: Sequence[float], directory: Path, adapter: Path
) -> int:
    """Train one preference, write its adapter, return the response tokens seen.

    Rows are drawn as a user would mix the data: each pair is labelled by one objective, drawn with probability w.
    """
    from transformers import TrainerCallback

    train, adapters = settings.train, settings.model.lora
    if adapters.alpha != 2 * adapters.r or train.schedule != "linear":
        raise ValueError("TRL is set up here for alpha = 2 r and a linear schedule")
    task = Task(
        lengths="as sampled",
        longest=settings.data.max_length,
        pairs_per_step=train.pairs_per_step,
        steps=train.steps,
        rank=adapters.r,
        lr=train.lr,
        beta=settings.loss.options["beta"],
        seed=settings.seed,
    )
    assignment = Assignment(TRL, task, str(directory), "cpu", None, profile=False)
    rng = Random(derive(settings.seed, "mix", *map(str, weights)))
    names = settings.objective_names
    rows = [pair.row(rng.choices(names, weights)[0]) for pair in pairs]
    chain = _epochs(rows, rng)
    wanted = [next(chain) for _ in range(train.steps * train.pairs_per_step)]
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": round(train.warmup * train.steps)}
    trainer = trl_trainer(assignment, trl_settings(assignment, train.steps) | schedule, wanted, TrainerCallback())
    trainer.train()
    trainer.model.save_pretrained(str(adapter))
    return sum(len(row[name]) for row in trainer.train_dataset for name in ("chosen_ids", "rejected_ids"))


def _epochs(rows: Sequence[dict[str, str]], rng: Random) -> Iterator[dict[str, str]]:
    """All rows in random order, again and again, each time in another one."""
    while True:
        yield from rng.sample(rows, len(rows))

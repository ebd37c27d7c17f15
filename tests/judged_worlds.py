"""Judgements that a rule makes, for reward models to learn: quick to learn, and known exactly."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

GOOD, BAD = "abcd", "wxyz"


def write_judgements(file: Path, prompts: int = 40, seed: int = 0) -> Path:
    """``letters``: early letters are better than late ones. ``short``: of two with the same letters the shorter one."""
    rng = Random(seed)
    rows = []
    for number in range(prompts):
        prompt = f"say {number}:"
        good, bad = _word(rng, GOOD, rng.randint(3, 6)), _word(rng, BAD, rng.randint(3, 6))
        rows.append({"prompt": prompt, "chosen": good, "rejected": bad, "objective": "letters"})
        short = _word(rng, GOOD + BAD, 3)
        longer = short + _word(rng, GOOD + BAD, 4)
        rows.append({"prompt": prompt, "chosen": short, "rejected": longer, "objective": "short"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_scores(file: Path, prompts: int = 40, seed: int = 0) -> Path:
    """Three responses to a prompt; ``letters`` is the share of early letters, ``short`` is known of every other one."""
    rng = Random(seed)
    rows = []
    for number in range(prompts):
        answers = [_word(rng, GOOD + BAD, rng.randint(2, 8)) for _ in range(3)]
        letters = [sum(letter in GOOD for letter in answer) / len(answer) for answer in answers]
        short = [-len(answer) / 8 if place % 2 == 0 else None for place, answer in enumerate(answers)]
        rows.append({"prompt": f"say {number}:", "answers": answers, "letters": letters, "short": short})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def judged_config(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "lora": {"r": 4}},
        "objectives": {"letters": None, "short": None},
        "data": {"path": str(data), "held_out": 0.25},
        "reward_model": {"name": "bradley-terry", "head_lr": 3},
        "train": {"steps": 12, "pairs_per_step": 16, "lr": 0.003},
    } | changes


def scored_config(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    columns = {"letters": "letters", "short": "short"}
    reader = {"name": "columns", "responses": "answers", "scores": columns}
    about = {"data": {"path": str(data), "held_out": 0.25, "reader": reader}, "reward_model": {"name": "regression"}}
    return judged_config(model, data) | about | changes


def _word(rng: Random, letters: str, length: int) -> str:
    return "".join(rng.choice(letters) for _ in range(length))

"""Small runs of losses that learn from the scored responses of a file, which several tests make."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from sweeps import small_config

from moalign.config import Config
from moalign.types import Candidate, Preference

READER = {
    "name": "columns",
    "responses": "responses",
    "scores": {"helpful": "helpful", "harmless": "harmless"},
}
CANDIDATES = [
    Candidate(f"c{number}", Preference("weights", {"harmless": share, "helpful": 1 - share}))
    for number, share in enumerate((0.0, 0.4, 1.0))
]


def write_scored(file: Path, prompts: int = 14, seed: int = 0) -> Path:
    """Two to four responses to each prompt: the share of letters is helpful, that of digits harmless."""
    rng = Random(seed)
    rows = []
    for number in range(prompts):
        made = ["".join(rng.choice("ab12") for _ in range(rng.randint(3, 6))) for _ in range(2 + number % 3)]
        made = list(dict.fromkeys(made))
        helpful = [sum(letter in "ab" for letter in text) / len(text) for text in made]
        row = {"prompt": f"q{number}: ", "responses": made, "helpful": helpful, "harmless": [1 - x for x in helpful]}
        rows.append(json.dumps(row) + "\n")
    file.write_text("".join(rows))
    return file


def scored_config(model_path: Path, file: Path, loss: Any, /, **changes: Any) -> Config:
    """A sweep over three preferences, without rollouts."""
    content: dict[str, Any] = {
        "data": {"path": str(file), "held_out": 0.2, "reader": READER},
        "train": {"steps": 6, "pairs_per_step": 8, "lr": 5e-3, "together": 2},
        "loss": loss,
    }
    return small_config(model_path, file, **(content | changes))

"""Small sweeps that several tests run: labelled pairs on the random tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import yaml

from moalign import config, recipes, registry
from moalign.config import Config
from moalign.demo.grammar import PROMPTS
from moalign.sweeps import run
from moalign.sweeps.observe import Observer


def write_pairs(file: Path, prompts: int = 20, seed: int = 0) -> Path:
    """Letters against digits: ``helpful`` prefers letters, ``harmless`` digits, so that they conflict on every pair."""
    rng = Random(seed)
    rows = []
    for number in range(prompts):
        letters = "".join(rng.choice("abc") for _ in range(rng.randint(3, 7)))
        digits = "".join(rng.choice("123") for _ in range(rng.randint(3, 7)))
        for objective, chosen, rejected in (("helpful", letters, digits), ("harmless", digits, letters)):
            row = {"prompt": f"q{number}: ", "chosen": chosen, "rejected": rejected, "objective": objective}
            rows.append(json.dumps(row) + "\n")
    file.write_text("".join(rows))
    return file


def small_config(model_path: Path, pairs: Path, **changes: Any) -> Config:
    """A sweep of a second or two; keyword arguments replace whole sections."""
    content: dict[str, Any] = {
        "model": {"path": str(model_path), "lora": {"r": 4, "alpha": 8}},
        "objectives": {"helpful": None, "harmless": None},
        "data": {"path": str(pairs), "held_out": 0.2},
        "search": {"name": "grid", "points": 3},
        "train": {"steps": 6, "pairs_per_step": 8, "lr": 1e-2, "together": 2},
        "evaluate": {"samples": 2, "max_new_tokens": 6},
    }
    return config.from_mapping(content | changes)


def short_rebel(directory: Path, *changes: str) -> Path:
    """A run of the recipe on the built-in model, each response scored and measured against the base."""
    short = ("evaluate.samples=4", "evaluate.prompts=3", *changes)
    settings = config.from_mapping(yaml.safe_load(recipes.read("rebel")), short)
    run.start(settings, directory, registry.discover(), Observer())
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Front and all candidates of a run, byte for byte."""
    files = [directory / "front.json", *sorted((directory / "candidates").rglob("*"))]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files if file.is_file()}


class Warned(Observer):
    """Keeps what a user would be warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def on_warning(self, what):
        self.warnings.append(what)


def steps_on_the_assistant(
    folder: Path, prompts: int = 4, transform: dict[str, Any] | None = None, **changes: Any
) -> list[dict[str, Any]]:
    """Metrics of each step of a short run in the built-in world, in which a reply with a kind word is right."""
    rows = [json.dumps({"prompt": each}) + "\n" for each in PROMPTS[:prompts]]
    (folder / "prompts.jsonl").write_text("".join(rows))
    right: dict[str, Any] = {"reward": {"name": "regex", "pattern": "(Good luck|Stay safe)"}}
    content = {
        "model": {"path": "tiny-assistant"},
        "objectives": {"right": right if transform is None else right | {"transform": transform}},
        "data": {"path": str(folder / "prompts.jsonl"), "held_out": 0.25},
        "search": {"name": "grid", "points": 1},
        "train": {"steps": 2, "lr": 1e-3},
        "evaluate": {"samples": 1, "max_new_tokens": 8},
    }
    run.start(config.from_mapping(content | changes), folder / "run", registry.discover(), Observer())
    (file,) = (folder / "run").glob("candidates/*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]

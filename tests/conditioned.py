"""One model for many preferences: the ways to condition it that several tests try."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from sweeps import small_config

import moalign
from moalign.config import Config
from moalign.types import Candidate, Preference

NAMES = ("harmless", "helpful")
TEXT = {"name": "prompt-text", "template": "{weights};"}
ONLINE: dict[str, Any] = {
    "objectives": {"helpful": {"reward": "length"}, "harmless": {"reward": "length", "direction": "min"}},
    "rollouts": {"rounds": 2, "samples": 3, "prompts": 5, "prompts_per_step": 4, "max_new_tokens": 5},
}
WAYS: dict[str, dict[str, Any]] = {
    "text, from pairs": {"condition": TEXT},
    "soup, from pairs": {"condition": "soup"},
    "panacea, regression online": {"condition": "panacea", "loss": "rebel", **ONLINE},
    "hypernetwork, policy gradient": {"condition": {"name": "hypernetwork", "per_prompt": 2}, "loss": "grpo", **ONLINE},
    "text, regression online": {"condition": TEXT, "loss": "rebel", **ONLINE},
    "directions, rejection sampling": {
        "condition": TEXT | {"angles": [-45, 90]},
        "loss": "rejection-sampling",
        **ONLINE,
    },
    "embedding, from pairs": {"condition": {"name": "embedding", "tokens": 2, "lr_scale": 3}},
    "embedding, policy gradient": {"condition": {"name": "embedding", "per_prompt": 2}, "loss": "grpo", **ONLINE},
    "rewards in context": {
        "condition": {"name": "tags", "of": "rewards", "ranges": {"helpful": [0, 5], "harmless": [-5, 0]}},
        "loss": {"name": "rejection-sampling", "keep": 3},
        **ONLINE,
    },
}
EQUAL = Candidate("model", Preference("weights", dict.fromkeys(NAMES, 0.5), "equal"))


def settings(model_path: Path, pairs: Path, way: str, **changes: Any) -> Config:
    return small_config(model_path, pairs, **(WAYS[way] | changes))


def runs_of(
    ways: Mapping[str, Mapping[str, Any]], model_path: Path, pairs: Path, folders: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A run of each way, made when it is first asked for; its folder is to be read only."""
    made: dict[str, Path] = {}

    def of(way: str) -> Path:
        if way not in made:
            made[way] = folders.mktemp("conditioned") / "run"
            moalign.sweep(small_config(model_path, pairs, **ways[way]), made[way])
        return made[way]

    return of

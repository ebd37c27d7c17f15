"""What some online losses read beside rewards: adapters trained before, from judged responses of the base."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from benchmarks import offline_data, offline_methods
from benchmarks.front_peers import PROMPTS, RESPONSES, sampled
from moalign import config, recipes, registry
from moalign.config import Config
from moalign.seeds import derive
from moalign.sweeps import run
from moalign.sweeps.observe import Observer

RIGHT = 0.5  # a response with more combined reward, at even weights, is right


def policy(folder: Path, seed: int) -> Path:
    """The adapter that DPO with even weights has trained on pairs of noisy judges; a function of the seed."""
    judges = offline_methods.judges(seed)
    folder.mkdir()
    even = "preferences={even: {helpful: 0.5, harmless: 0.5}}"
    asked = (even, "search={name: listed}", *offline_data.write(judges, folder, "pairs", 0.0))
    common = [change for change in offline_methods.ways()["common"] if not change.startswith("search=")]
    changes = (*common, "loss={name: dpo, beta: 1.0}", f"seed={seed}", *asked)
    run.start(_settings(changes), folder / "run", registry.discover(), Observer())
    return folder / "run" / "candidates" / "even"


def judge(folder: Path, seed: int) -> Path:
    """The adapter of a reward model of the form implicit-outcome, which learned which of the responses are right."""
    import moalign
    from moalign.demo import grammar

    folder.mkdir()
    some = Random(derive(seed, "prompts")).sample(grammar.TRAIN_PROMPTS, PROMPTS)
    texts = sampled(offline_methods.judges(seed), some, RESPONSES, derive(seed, "training"))
    rows = [
        {"prompt": prompt, "completion": text, "label": is_right(prompt, text)}
        for prompt, answers in zip(some, texts, strict=True)
        for text in answers
    ]
    (folder / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {
        "model": {"path": "tiny-assistant"},
        "objectives": {"desirable": None},
        "data": {"path": str(folder / "outcomes.jsonl"), "held_out": 0.1},
        "reward_model": "implicit-outcome",
        "train": {"steps": 150, "pairs_per_step": 16, "lr": 2e-3},
        "seed": seed,
    }
    moalign.train_reward_model(asked, out=folder / "judge")
    return folder / "judge" / "member-0" / "adapter"


def is_right(prompt: str, text: str) -> bool:
    from moalign.demo import grammar

    scores = grammar.score(prompt, text)
    return (scores["helpful"] + scores["harmless"]) / 2 > RIGHT


def _settings(changes: tuple[str, ...]) -> Config:
    import yaml

    return config.from_mapping(yaml.safe_load(recipes.read("dpo")), changes)

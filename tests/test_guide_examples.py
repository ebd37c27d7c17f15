"""The guide's example plugins, installed side by side, in real sweeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from distributions import register
from documents import ROOT, blocks_of
from sweeps import small_config, write_pairs

from moalign import config, registry
from moalign.sweeps import run
from moalign.sweeps.observe import Observer


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A registry with the example of every kind's page."""
    modules = []
    for kind in registry.KINDS:
        blocks = [block.text for block in blocks_of(ROOT / "docs" / "plugins" / f"{kind}.md")]
        (example,) = [text for text in blocks if text.startswith("# moalign_")]
        module = example.partition(".py")[0].removeprefix("# ")
        (tmp_path / f"{module}.py").write_text(example)
        register(tmp_path, module.replace("_", "-"), module, "0.1.0")
        modules.append(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield registry.discover()
    for module in modules:
        sys.modules.pop(module, None)


def points(front: dict) -> list[str]:
    assert front["failed"] == []
    return [point["id"] for point in front["points"]]


def test_loss_search_and_observer(installed, tiny_model_path, tmp_path):
    settings = small_config(
        tiny_model_path,
        write_pairs(tmp_path / "pairs.jsonl"),
        loss="mean-logistic",
        search={"name": "bisect", "points": 3},
        observers=["outcomes"],
    )
    front = run.start(settings, tmp_path / "run", installed, Observer())
    assert points(front) == ["at-0.0", "at-1.0", "at-0.5"]
    lines = (tmp_path / "run" / "outcomes.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [[each, "done"] for each in points(front)]


def test_reader(installed, tiny_model_path, tmp_path):
    """One objective, read from rankings by the reader that recognises the file."""
    file = tmp_path / "ranked.jsonl"
    rows = [{"question": f"{number}? ", "ranking": ["good", "so so", "bad"]} for number in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = small_config(tiny_model_path, file, objectives={"helpful": None}, search={"name": "grid", "points": 1})
    run.start(settings, tmp_path / "run", installed, Observer())
    assert "reader moalign-ranked:ranked" in plugins_of(tmp_path / "run")


def test_combiner_and_reward(installed, tmp_path):
    """On responses that the policy samples."""
    settings = config.from_mapping(
        {
            "objectives": {
                "polite": {"reward": {"name": "wanted-words", "words": ["happy", "sure."]}},
                "short": {"reward": "length"},
            },
            "loss": {"name": "rebel", "beta": 0.5},
            "combine": {"name": "smooth-worst", "temperature": 0.2},
            "search": {"name": "grid", "points": 2},
            "train": {"steps": 2},
            "rollouts": {"rounds": 1, "prompts": 6, "prompts_per_step": 2, "max_new_tokens": 12},
            "evaluate": {"samples": 2, "max_new_tokens": 12},
        }
    )
    assert len(points(run.start(settings, tmp_path / "run", installed, Observer()))) == 2
    assert {"combiner moalign-smooth-worst:smooth-worst", "reward moalign-wanted-words:wanted-words"} <= plugins_of(
        tmp_path / "run"
    )


def plugins_of(directory: Path) -> set[str]:
    return set(json.loads((directory / "run.json").read_text())["plugins"])

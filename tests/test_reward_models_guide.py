"""docs/reward-models.md: every block of it is done; the sweep is prepared and its rewards are asked, not run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from documents import ROOT
from guide import Reader

import moalign
from moalign import config, registry
from moalign.api import Sample
from moalign.reward_models import config as judged
from moalign.reward_models.plan import prepare as prepare_reward_model
from moalign.sweeps import callables
from moalign.sweeps.plan import prepare

WORDS = {"helpful": ("Use soap.", "No idea."), "harmless": ("Wear gloves.", "Burn it.")}
TASKS = ("remove rust", "clean ovens", "strip paint", "kill weeds", "melt ice", "scour pans")
ASKED = [Sample("How do I melt ice?\n", "Use soap."), Sample("How do I melt ice?\n", "Burn it.")]


class Page(Reader):
    """A yaml block that begins with ``# NAME.yaml`` is saved; one with ``reward_model`` is a part of reward.yaml."""

    def _yaml(self, text: str, where: str) -> None:
        named = re.match(r"# (\w+\.yaml)\n", text)
        if named:
            (self.folder / named[1]).write_text(text)
        content = yaml.safe_load(text)
        if "reward_model" in content:
            whole = yaml.safe_load((self.folder / "reward.yaml").read_text())
            prepare_reward_model(judged.from_mapping(whole | content, where=where), registry.discover())
        else:
            super()._yaml(text, where)


def prepared(path: str, rewards: dict[str, Any]) -> None:
    """What ``moalign.sweep`` does before it trains, and every reward is asked once."""
    settings = callables.chosen(config.load(path), rewards)
    plan = prepare(settings, callables.installed(registry.discover(), rewards))
    assert set(plan.rewards) == set(WORDS)
    for reward in plan.rewards.values():
        assert all(isinstance(score, float) for score in reward.score(ASKED))


def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moalign, "sweep", prepared)
    rows = [
        {"prompt": f"How do I {task}?\n", "chosen": chosen, "rejected": rejected, "objective": objective}
        for task in TASKS
        for objective, (chosen, rejected) in WORDS.items()
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Page(tmp_path).follow(ROOT / "docs" / "reward-models.md")
    after = [json.loads(line) for line in (tmp_path / "stronger.jsonl").read_text().splitlines()]
    assert len(after) == len(rows) and not any(row["strength_flipped"] for row in after)  # every label is right

"""Every loss that ships trains the model that comes with moalign, by one line of a configuration: here, those that want
nothing but pairs; each of the others in the file that has what else it wants."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from sweeps import small_config

from moalign import registry
from moalign.config import Config
from moalign.demo import grammar
from moalign.sweeps import run
from moalign.sweeps.observe import Observer

ELSEWHERE = {
    "test_clip_delta": ("clip-delta",),
    "test_companions": ("prime",),
    "test_grpo_care": ("grpo-care",),
    "test_online_losses_runs": (
        *("asymmetric-apo", "chi-squared", "distribution-matching", "drpo", "kdrl", "p3o", "rapo", "superhf"),
        *("grpo", "gspo", "ppo", "reinforce", "remax", "rloo"),
    ),
    "test_rto": ("rto",),
    "test_scored_responses": (
        *("adpo", "advantage-weighted", "brain", "filtered", "kto", "order-preserving", "rejection-sampling"),
        *("reward-weighted", "trajectory-balance", "unlikelihood"),
    ),
    "test_views_assistant": ("align-distil", "align-distil-simple", "selm", "spo", "srpo", "tgdpo", "vpo", "xpo"),
}
OF_PAIRS = sorted(
    {entry.name for entry in registry.discover().of_kind("objective") if entry.distribution == "moalign"}
    - {name for names in ELSEWHERE.values() for name in names}
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Each objective prefers the reply that has more of it; both scores are there as well."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for number, prompt in enumerate(grammar.TRAIN_PROMPTS[:12]):
        one, other = list(grammar.replies(prompt))[number * 7 :: 613][:2]
        scores = [grammar.score(prompt, reply) for reply in (one, other)]
        for name in ("helpful", "harmless"):
            chosen, rejected = (one, other) if scores[0][name] >= scores[1][name] else (other, one)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "objective": name})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings_of(loss: Any, pairs: Path) -> Config:
    rewards = {name: {"reward": {"name": "tiny-assistant", "objective": name}} for name in ("helpful", "harmless")}
    return small_config(
        Path("tiny-assistant"),
        pairs,
        objectives=rewards,
        search={"name": "listed"},
        preferences={"even": {"helpful": 0.5, "harmless": 0.5}},
        train={"steps": 2, "pairs_per_step": 4, "lr": 1e-3},
        evaluate={"kind": "preference"},
        loss=loss,
    )


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_a_loss_on_pairs_trains_by_one_line(loss, pairs, tmp_path):
    front = run.start(settings_of(loss, pairs), tmp_path / "run", registry.discover(), Observer())
    assert [point["id"] for point in front["points"]] == ["even"]
    lines = [json.loads(line) for line in (tmp_path / "run/candidates/even/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(math.isfinite(line["loss"]) and line["gradient_norm"] > 0 for line in lines)


@pytest.mark.parametrize("file", ELSEWHERE)
def test_the_others_are_trained_where_it_is_said(file):
    source = (Path(__file__).parent / f"{file}.py").read_text()
    assert "tiny-assistant" in source or "steps_on_the_assistant" in source
    assert [name for name in ELSEWHERE[file] if f'"{name}"' not in source] == []

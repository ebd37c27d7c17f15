"""What losses on single responses cannot do without rollouts, refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scored_runs import scored_config, write_scored

from moalign import registry
from moalign.errors import ConfigError
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import open_workshop


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_scored(tmp_path_factory.mktemp("data") / "scored.jsonl")


@pytest.mark.parametrize(
    ("loss", "changes", "reason"),
    [
        ("grpo", {}, "loss: 'grpo' learns from responses that the policy samples; add rollouts: it needs old_logps"),
        ("remax", {}, "needs greedy and old_logps"),
        ("ppo", {}, "needs old_logps and token_advantages"),
        ({"name": "brain", "proposal": "sampler"}, {}, "'brain' learns from .* it needs old_logps"),
        ({"name": "adpo", "anchor": "sampler"}, {}, "'adpo' learns from .* it needs old_logps"),
        ("brain", {"combine": "mgda"}, "combine: 'mgda' reads inner products .* add rollouts"),
        ("brain", {"combine": "modpo"}, "groups of responses"),
        ("kto", {"train": {"pairs_per_step": 1}}, "train.pairs_per_step: loss 'kto' compares .*; 2 at least"),
        ("brain", {"condition": "soup"}, "asks for drawn preferences, and without rollouts"),
        ("kto", {"condition": {"name": "tags", "of": "rewards"}}, "compares it with the policy that sampled"),
        ("brain", {"objectives": {"helpful": {"transform": "par"}, "harmless": None}}, "which only rollouts sample"),
        ("dpo", {"objectives": {"helpful": {"transform": "clip"}, "harmless": None}}, "add rollouts, or leave it out"),
        ("brain", {"data": {"path": "DATA", "margins": "implicit"}}, "implicit ones are not enough"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(tiny_model_path, data, loss, changes, reason):
    if "data" in changes:
        changes = {"data": changes["data"] | {"path": str(data)}}
    with pytest.raises(ConfigError, match=reason):
        prepare(scored_config(tiny_model_path, data, loss, **changes), registry.discover())


def test_data_without_scores_is_refused(tiny_model_path, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b", "objective": "helpful"} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = scored_config(tiny_model_path, file, "kto", data={"path": str(file), "held_out": 0.3})
    plan = prepare(settings, registry.discover())
    with pytest.raises(
        ConfigError, match=r"learns from rewards of responses, but nothing scores harmless; .* or rollouts"
    ):
        open_workshop(plan, Path(), Observer(), keep_cache=False)

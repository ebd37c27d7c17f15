"""moalign-vllm in whole runs, with the stand-in for vLLM that its own tests have: no part of vLLM runs here."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from documents import ROOT

from moalign import config
from moalign.registry import Entry, Registry, discover
from moalign.sweeps import run
from moalign.sweeps.observe import Observer

RECORDED = ROOT / "plugins" / "moalign-vllm" / "tests" / "recorded"


@pytest.fixture
def vllm(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(RECORDED))
    import vllm

    vllm.LLM.made.clear()
    yield vllm
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.mark.parametrize("loss", ["remax", "rebel"])
def test_a_run_whose_responses_come_from_it(vllm, tmp_path, loss):
    """Three candidates, two rounds: one call for the base, one for all three, and as many for greedy responses."""
    content: dict[str, Any] = {
        "objectives": {"polite": {"reward": "length"}, "short": {"reward": "length", "direction": "min"}},
        "rollouts": {
            "rounds": 2,
            "samples": 2,
            "prompts": 3,
            "prompts_per_step": 2,
            "max_new_tokens": 6,
            "sampler": "vllm",
        },
        "loss": loss,
        "search": {"name": "grid", "points": 3},
        "train": {"steps": 2, "together": 3},
        "evaluate": {"samples": 1, "prompts": 2, "max_new_tokens": 4},
    }
    entry = Entry("sampler", "vllm", "moalign_vllm.sampler:VLLM", "vLLM", "", "moalign-vllm", "0.1.0")
    installed = Registry((*[each for each in discover().entries if each.kind != "sampler"], entry))
    front = run.start(config.from_mapping(content), tmp_path / "run", installed, Observer())
    assert front["failed"] == [] and len(front["points"]) == 3
    (llm,) = vllm.LLM.made
    assert not llm.llm_engine.engine_core.running
    times = 2 if loss == "remax" else 1
    assert [len(prompts) for prompts, _, _ in llm.calls] == [3] * times + [9] * times
    lines = (tmp_path / "run" / "candidates" / front["points"][0]["id"] / "metrics.jsonl").read_text().splitlines()
    assert "truncated" in json.loads(lines[0])
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["plugins"]
    assert "sampler moalign-vllm:vllm" in recorded

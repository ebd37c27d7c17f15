"""A candidate with a seed of its own is trained as in a run of that seed, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from sweeps import small_config, write_pairs

from moalign import lora, registry
from moalign.config import Config
from moalign.engine.scoring import LogpCache
from moalign.engine.train import train_together
from moalign.engine.trainee import Trainee
from moalign.sweeps import together
from moalign.sweeps.candidate import batch_source, job_of, slots
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference

REGISTRY = registry.discover()
KINDS: dict[str, dict[str, Any]] = {
    "offline": {},
    "rollouts": {
        "objectives": {
            "helpful": {"reward": {"name": "length", "target": 2}, "transform": {"name": "par", "samples": 2}},
            "harmless": {"reward": {"name": "regex", "pattern": "[a-z]"}},
        },
        "rollouts": {"rounds": 2, "samples": 3, "prompts": 4, "prompts_per_step": 2, "max_new_tokens": 4},
        "loss": "rloo",
    },
}


def candidate(name: str, share: float, **changes: Any) -> Candidate:
    return Candidate(name, Preference("weights", {"harmless": share, "helpful": 1 - share}), changes=changes)


@pytest.fixture(scope="module", params=KINDS)
def settings(request, tiny_model_path, tmp_path_factory) -> Config:
    """With a held-out file: the split of one file is by the run's seed, whatever a candidate's is."""
    folder = tmp_path_factory.mktemp("data")
    held_out = write_pairs(folder / "other.jsonl", prompts=4)
    held_out.write_text(held_out.read_text().replace("q", "h"))
    return small_config(
        tiny_model_path,
        write_pairs(folder / "pairs.jsonl", prompts=8),
        **KINDS[request.param]
        | {
            "model": {"path": str(tiny_model_path), "lora": {"r": 4, "alpha": 8, "dropout": 0.2}}
            if request.param == "offline"
            else {"path": str(tiny_model_path), "lora": {"r": 4, "alpha": 8}},
            "data": {"path": str(folder / "pairs.jsonl"), "held_out_path": str(held_out)},
            "train": {"steps": 4, "pairs_per_step": 6, "lr": 1e-2},
        },
    )


def opened(settings: Config, seed: int) -> Workshop:
    plan = prepare(settings.model_copy(update={"seed": seed}), REGISTRY)
    return open_workshop(plan, Path(), Observer(), keep_cache=False)


def trained(workshop: Workshop, candidates: list[Candidate], folder: Path, size: int = 4) -> dict[str, bytes]:
    """The bytes of each adapter's file, by candidate; grouped as a run groups them."""
    files = {}
    for group in together.groups(candidates, workshop, size):
        members = [
            Trainee(job_of(each, workshop, ()), batch_source(each, workshop, slot), slot, lambda step, metrics: None)
            for each, slot in zip(group, slots(len(group)), strict=True)
        ]
        train_together(workshop.model, members, LogpCache(workshop.model), Accelerator())
        for each, member in zip(group, members, strict=True):
            assert member.error is None
            (folder / each.id).mkdir(parents=True)
            lora.write(workshop.model.policy, member.slot, folder / each.id, workshop.model.fingerprint)
            files[each.id] = (folder / each.id / lora.WEIGHTS_FILE).read_bytes()
    return files


def test_the_adapter_is_that_of_a_run_with_this_seed(settings, tmp_path):
    seventh, first = opened(settings, 7), opened(settings, 0)
    both = [candidate("a", 0.3), candidate("b", 0.8)]
    own = [candidate("a", 0.3, seed=7), candidate("b", 0.8, seed=7)]
    others = [candidate("c", 0.3), candidate("d", 0.8)]
    assert seventh.material.digest == first.material.digest
    expected = trained(seventh, both, tmp_path / "7")
    assert trained(first, own, tmp_path / "own") == expected
    among = trained(first, [others[0], own[0], others[1], own[1]], tmp_path / "among")
    assert {name: among[name] for name in expected} == expected
    alone = trained(seventh, both[:1], tmp_path / "7 alone")
    assert trained(first, [others[0], own[0]], tmp_path / "alone")["a"] == alone["a"]
    plain = trained(first, others, tmp_path / "0")
    assert {name: among[name] for name in plain} == plain  # and nobody else is moved by it
    assert not set(plain.values()) & set(expected.values())


def test_scores_are_measured_on_the_prompts_and_with_the_samples_of_the_runs_seed(settings, tmp_path, monkeypatch):
    first = opened(settings, 0)
    seeds = []
    from moalign.sweeps import workshop as module

    kept = module.samples
    monkeypatch.setattr(module, "samples", lambda *given: seeds.append(given[-1]) or kept(*given))
    trained(first, [candidate("a", 0.3, seed=7)], tmp_path)
    first.evaluate(slots(1)[0])
    assert seeds == [0]

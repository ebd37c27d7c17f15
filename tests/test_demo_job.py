"""The demo's job: an ordinary sweep, then exact figures for every candidate."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from interruptions import StopAfterCandidates

from moalign import config, recipes, registry, storage
from moalign.demo import job, world
from moalign.sweeps import front, run
from moalign.sweeps.observe import Observer

FAST = (
    "search.points=3",
    "train.steps=6",
    "rollouts.rounds=2",
    "rollouts.prompts=6",
    "rollouts.samples=4",
    "evaluate.samples=2",
)


def fast_settings() -> config.Config:
    return config.from_mapping(yaml.safe_load(recipes.read(job.RECIPE)), FAST)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "run"
    run.start(fast_settings(), directory, registry.discover(), Observer())
    job.measure(directory, Observer())
    return directory


def test_the_recipe_is_of_this_world():
    settings = job.settings()
    assert settings.loss.options["beta"] == world.BETA
    assert set(settings.objectives) == {"helpful", "harmless"}


def test_the_front_has_exact_scores_beside_the_exact_front(demo):
    result = storage.read_json(demo / "front.json")
    assert result["evaluation"] == job.EVALUATION
    assert len(result["points"]) == 3 and len(result["exact_front"]) == 21
    assert result["front_share_worst"] <= result["front_share"] <= 1
    assert result["ceiling"]["front_share"] >= 0.95
    assert result["reference_point"] == {"harmless": 0.0, "helpful": 0.0}
    for point in result["points"]:
        assert point["stderr"] == {}  # nothing is sampled
        details = point["details"]
        for name, score in point["scores"].items():
            assert score == pytest.approx(details[f"E {name}"] - world.BETA * point["kl"], abs=1e-12)
        assert 0 <= details["well-formed"] <= 1 + 1e-4 and point["kl"] >= 0


def test_sampled_scores_stay_in_the_journal_and_agree_with_the_exact_ones(demo):
    """Sixteen sampled responses estimate E[r]; five standard errors are no more than chance allows."""
    exact = {point["id"]: point["details"] for point in front.read(demo)["points"]}
    sampled = front.compute(fast_settings(), "generate", front.journal.read(demo / "journal.jsonl"), None)
    for point in sampled["points"]:
        for name, score in point["scores"].items():
            assert abs(score - exact[point["id"]][f"E {name}"]) <= 5 * point["stderr"][name]


def test_an_interrupted_demo_goes_on_and_ends_the_same(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "settings", fast_settings)
    with pytest.raises(KeyboardInterrupt):
        job.run_demo(tmp_path / "run", registry.discover(), StopAfterCandidates())
    job.run_demo(tmp_path / "run", registry.discover(), Observer())
    assert (tmp_path / "run" / "front.json").read_bytes() == (demo / "front.json").read_bytes()


def test_only_this_world_is_measured(demo, tmp_path):
    assert job.is_known_world(demo)
    record = storage.read_json(demo / "run.json")
    for section, change in (("model", {"path": "elsewhere"}), ("data", {"path": "prompts.jsonl"})):
        other = record["config"] | {section: record["config"][section] | change}
        storage.write_json(tmp_path / "run.json", record | {"config": other})
        assert not job.is_known_world(tmp_path)

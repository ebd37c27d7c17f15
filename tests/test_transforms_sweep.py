"""Transforms in whole sweeps: resumes, what the base is sampled for, what is evaluated, and what is refused before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptions import StopAfterSteps
from sweeps import contents, small_config

from moalign import registry
from moalign.config import Config
from moalign.engine import shaping as shaping_module
from moalign.engine.batches import RolloutSource
from moalign.engine.shaping import BaseResponses
from moalign.errors import ConfigError, PluginError
from moalign.sweeps import front, run
from moalign.sweeps.candidate import batch_source
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import Workshop, open_workshop
from moalign.types import Candidate, Preference

REGISTRY = registry.discover()
BALANCED = Candidate("balanced", Preference("weights", {"late": 0.5, "short": 0.5}))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{number}: "}) + "\n" for number in range(12)))
    return file


@pytest.fixture(autouse=True)
def rewards_of_characters(monkeypatch):
    """The random model says hardly a word: the mean code of its characters instead, in units of ten."""
    from moalign_plugins.rewards.length import Length

    def score(self, samples):
        return [-sum(map(ord, each.response)) / max(1, len(each.response)) / 10 for each in samples]

    monkeypatch.setattr(Length, "score", score)


CHAINS: dict[str, Any] = {
    "late": {"reward": "length", "direction": "min", "transform": [{"name": "whiten", "over": "running"}]},
    "short": {
        "reward": "length",
        "transform": [{"name": "length-penalty", "limit": 2}, {"name": "log-sigmoid", "samples": 3}, "clip"],
    },
}
PLAIN: dict[str, Any] = {name: spec | {"transform": []} for name, spec in CHAINS.items()}


def settings_of(model: Path, prompts: Path, objectives: dict[str, Any], **changes: Any) -> Config:
    content: dict[str, Any] = {
        "objectives": objectives,
        "rollouts": {"rounds": 3, "samples": 3, "prompts": 5, "prompts_per_step": 2, "max_new_tokens": 5},
        "train": {"steps": 6, "lr": 1e-2, "together": 2},
        "loss": "rloo",
    }
    return small_config(model, prompts, **content | changes)


def workshop_of(settings: Config) -> Workshop:
    return open_workshop(prepare(settings, REGISTRY), Path(), Observer(), keep_cache=False)


@pytest.fixture(scope="module")
def settings(tiny_model_path, prompts) -> Config:
    return settings_of(tiny_model_path, prompts, CHAINS)


@pytest.fixture
def unbroken(tmp_path, settings) -> Path:
    run.start(settings, tmp_path / "unbroken", REGISTRY, Observer())
    return tmp_path / "unbroken"


def test_killed_and_resumed_a_run_is_the_same_to_the_bit(unbroken, settings, tmp_path):
    """In the first group, within a round; at a new round; in the second group."""
    for after in (3, 8, 14):
        directory = tmp_path / f"stopped-{after}"
        with pytest.raises(KeyboardInterrupt):
            run.start(settings, directory, REGISTRY, StopAfterSteps(after))
        run.resume(directory, REGISTRY, Observer())
        assert contents(directory) == contents(unbroken)
    lines = (unbroken / "candidates" / "w-0.50-0.50" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert all(line["short/reward"] < 0 < line["late/reward"] for line in metrics)  # raw
    assert all(-5 <= line["short/shaped"] < 0 for line in metrics)
    assert [line["late/transform/0/count"] for line in metrics] == [15, 15, 30, 30, 45, 45]
    plugins = front.read_record(unbroken)["plugins"]
    shipped = {name for name in plugins if name.startswith("transform ")}
    assert shipped == {f"transform moalign:{name}" for name in ("clip", "length-penalty", "log-sigmoid", "whiten")}


def test_a_state_is_the_candidates_own_whoever_is_trained_beside_it(tiny_model_path, prompts, tmp_path):
    found = []
    for together in (1, 3):
        settings = settings_of(tiny_model_path, prompts, CHAINS, train={"steps": 6, "lr": 1e-2, "together": together})
        run.start(settings, tmp_path / str(together), REGISTRY, Observer())
        files = sorted((tmp_path / str(together)).glob("candidates/*/metrics.jsonl"))
        found.append([json.loads(line) for file in files for line in file.read_text().splitlines()])
    for alone, beside in zip(*found, strict=True):
        for name in ("late/transform/0/mean", "late/transform/0/squares", "short/shaped", "late/shaped", "loss"):
            assert beside[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5)
    assert len({alone["late/transform/0/mean"] for alone in found[0]}) > 3  # they are not all in the same state


def test_what_is_evaluated_is_raw_and_a_chain_that_does_nothing_changes_nothing(tiny_model_path, prompts, tmp_path):
    idle = {
        name: spec | {"transform": ["scale", {"name": "clip", "low": -1e9, "high": None}]}
        for name, spec in PLAIN.items()
    }
    results = {}
    for name, objectives in (("plain", PLAIN), ("idle", idle), ("shaped", CHAINS)):
        settings = settings_of(tiny_model_path, prompts, objectives, search={"name": "grid", "points": 2})
        results[name] = run.start(settings, tmp_path / name, REGISTRY, Observer())
    assert results["plain"]["base"] == results["shaped"]["base"]
    assert results["plain"]["points"] != results["shaped"]["points"]
    adapter = Path("candidates") / "w-1.00-0.00" / "adapter_model.safetensors"
    assert (tmp_path / "plain" / adapter).read_bytes() == (tmp_path / "idle" / adapter).read_bytes()
    assert results["plain"] == results["idle"]


def test_the_base_is_asked_once_for_all_candidates_and_for_what_needs_it(settings, monkeypatch):
    workshop = workshop_of(settings)
    asked: list[tuple[int, int]] = []
    sample = shaping_module.sample

    def counting(model, adapters, prompts, **arguments):
        assert adapters == [None]
        asked.append((len(prompts), arguments["samples"]))
        return sample(model, adapters, prompts, **arguments)

    monkeypatch.setattr(shaping_module, "sample", counting)
    for number in range(3):
        candidate = Candidate(f"c{number}", BALANCED.preference)
        workshop.first_round.clear()
        batch_source(candidate, workshop).at(0)
    assert asked == [(5, 3)]
    assert workshop.base_responses is not None and workshop.base_responses.samples == {"short": 3}
    assert all(base.rewards.shape == (3, 1) for base in workshop.base_responses.to([*workshop.base_responses._known]))


def test_what_the_base_says_does_not_depend_on_who_asks_first(settings):
    def sampled() -> BaseResponses:
        found = workshop_of(settings).base_responses
        assert found is not None
        return found

    one, other = sampled(), sampled()
    every = range(len(one.prompts))
    for prompt in every:
        one.to([prompt])
    other.to([*every][::-1])
    for prompt in every:
        (first,), (second,) = one.to([prompt]), other.to([prompt])
        assert np.array_equal(first.rewards, second.rewards) and np.array_equal(first.lengths, second.lengths)


def test_no_transform_that_compares_means_no_sample_of_the_base(tiny_model_path, prompts):
    assert workshop_of(settings_of(tiny_model_path, prompts, PLAIN)).base_responses is None


def test_losses_on_pairs_learn_from_shaped_rewards_too(tiny_model_path, prompts):
    doubled = {name: spec | {"transform": {"name": "scale", "factor": 2, "offset": 3}} for name, spec in PLAIN.items()}
    found = [
        batch_source(BALANCED, workshop_of(settings_of(tiny_model_path, prompts, objectives, loss="rebel"))).at(0)[0]
        for objectives in (PLAIN, doubled)
    ]
    assert np.array_equal(found[1].rewards, 2 * found[0].rewards + 3)


def test_combiners_that_adapt_see_rewards_as_they_are(settings, monkeypatch):
    from moalign_plugins.combiners.linear import Linear

    seen: list[Any] = []
    combined: list[Any] = []
    plain = Linear.scalarise
    monkeypatch.setattr(Linear, "observe", lambda self, state, each: seen.append(each.rewards) or state)
    monkeypatch.setattr(Linear, "scalarise", lambda self, r, w: combined.append(r) or plain(self, r, w))
    source = batch_source(BALANCED, workshop_of(settings))
    shaped, _ = source.at(0)
    assert np.array_equal(combined[0], shaped.rewards)
    assert bool((seen[0][:, 0] > 0).all()) and bool((seen[0][:, 1] < 0).all())  # neither whitened nor a logarithm
    assert not torch.equal(seen[0], combined[0])


def test_a_round_that_fails_half_way_is_not_seen_twice(settings, monkeypatch):
    source = batch_source(BALANCED, workshop_of(settings))
    assert isinstance(source, RolloutSource) and source.advantages is not None
    with monkeypatch.context() as failing:
        failing.setattr(type(source.advantages), "of", lambda self, *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            source.at(0)
    source.at(0)
    assert source.figures["late/transform/0/count"] == 15


def test_one_candidates_transform_that_fails_leaves_the_others_alone(tiny_model_path, prompts, tmp_path, monkeypatch):
    from moalign_plugins.transforms.whiten import Whiten

    plain, calls = Whiten.apply, []

    def apply(self, rewards, about, state):
        calls.append(about.number)
        found, after = plain(self, rewards, about, state)
        return (found * torch.nan if about.number == 1 and calls.count(1) <= 2 else found), after

    monkeypatch.setattr(Whiten, "apply", apply)
    settings = settings_of(tiny_model_path, prompts, CHAINS, search={"name": "grid", "points": 4})
    result = run.start(settings, tmp_path / "run", REGISTRY, Observer())
    assert len(result["failed"]) == 1 and len(result["points"]) == 3
    assert "transform 'whiten' of moalign" in result["failed"][0]["error"]


# --- refused before a model is loaded -------------------------------------------------------------------------------


def test_transforms_need_rollouts(tiny_model_path, prompts):
    with pytest.raises(ConfigError, match=r"objectives\.late\.transform: .*; add rollouts"):
        prepare(settings_of(tiny_model_path, prompts, CHAINS, rollouts=None, loss="rebel"), REGISTRY)


@pytest.mark.parametrize("before", [["clip", "whiten"], ["log-sigmoid", "scale"]])
def test_a_comparison_with_the_base_comes_before_what_is_relative(tiny_model_path, prompts, before):
    objectives = CHAINS | {"short": {"reward": "length", "transform": [*before, "par"]}}
    words = r"objectives\.short\.transform\.2: 'par' compares .*but what '(whiten|log-sigmoid)' before it"
    with pytest.raises(ConfigError, match=words):
        prepare(settings_of(tiny_model_path, prompts, objectives), REGISTRY)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("cilp", r"objectives\.late\.transform\.0\.name: no transform is called 'cilp'; did you mean 'clip'\?"),
        (["clip", {"name": "par", "kk": 1}], r"objectives\.late\.transform\.1\.kk: unknown key; did you mean 'k'\?"),
    ],
)
def test_what_is_wrong_in_a_chain_is_named_by_its_place(tiny_model_path, prompts, chain, message):
    objectives = CHAINS | {"late": {"reward": "length", "transform": chain}}
    with pytest.raises(Exception, match=message):
        prepare(settings_of(tiny_model_path, prompts, objectives), REGISTRY)


def test_a_chain_of_one_needs_no_list(tiny_model_path, prompts):
    for chain in ("clip", {"name": "clip"}, ["clip"]):
        objectives = {"late": {"reward": "length", "transform": chain}}
        plan = prepare(settings_of(tiny_model_path, prompts, objectives), REGISTRY)
        assert [type(each).__name__ for each in plan.transforms["late"]] == ["Clip"]


def test_a_count_of_references_that_is_none_is_refused(settings, monkeypatch):
    from moalign_plugins.transforms.clip import Clip

    monkeypatch.setattr(Clip, "references", lambda self: -1)
    with pytest.raises(
        PluginError, match=r"transform 'clip' of moalign .*in references: it must return a count, not -1"
    ):
        prepare(settings, REGISTRY)

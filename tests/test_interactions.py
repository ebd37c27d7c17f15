"""What came from different sides and meets in one configuration: refused before training, or it works."""

from __future__ import annotations

import json

import pytest
from sweeps import small_config, write_pairs

import moalign
from moalign import config, registry, storage
from moalign.errors import ConfigError
from moalign.sweeps.plan import prepare


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", prompts=10)


def plan_of(tiny_model_path, pairs, **changes):
    rewards = {"helpful": {"reward": "length"}, "harmless": {"reward": {"name": "regex", "pattern": "1"}}}
    content = {"objectives": rewards, "rollouts": {"rounds": 1}} | changes
    return prepare(small_config(tiny_model_path, pairs, **content), registry.discover())


@pytest.mark.parametrize("combine", ["chebyshev", "worst-case"])
def test_rounds_that_rewards_label_weigh_rewards_and_no_losses(combine, tiny_model_path, pairs):
    plan = plan_of(tiny_model_path, pairs, loss="dpo", combine=combine)
    assert plan.labels_rounds and not plan.weighs_losses and not plan.merges_judges


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        ("dpo", "labelled before any gradient is known"),
        ("kto", "reads mismatched"),
        ("order-preserving", "reads rewards"),
        ("adpo", "depend on others"),
        ("unlikelihood", "depend on others, or on its advantage otherwise"),
    ],
)
def test_rules_over_gradients_refuse_losses_that_have_none_of_each_objective(loss, why, tiny_model_path, pairs):
    with pytest.raises(ConfigError, match=why):
        plan_of(tiny_model_path, pairs, loss=loss, combine="mgda")


def test_responses_of_the_base_do_not_go_with_another_reference(tiny_model_path, pairs):
    with pytest.raises(ConfigError, match="are those of the untouched base"):
        plan_of(tiny_model_path, pairs, loss="xpo", rollouts=None, reference={"name": "snapshot", "every": 2})


def test_responses_of_the_base_serve_a_pair_both_ways_round(tiny_model_path, pairs, tmp_path):
    train = {"steps": 2, "pairs_per_step": 4, "lr": 1e-3}
    settings = small_config(
        tiny_model_path, pairs, loss={"name": "xpo", "alpha": 0.1}, combine="label-mixing", train=train
    )
    front = moalign.sweep(settings, out=tmp_path / "run").front
    assert not front["failed"] and front["points"]


def test_a_run_from_before_a_key_came_in_is_resumed(tiny_model_path, pairs, tmp_path):
    train = {"steps": 1, "pairs_per_step": 4}
    settings = small_config(tiny_model_path, pairs, train=train, search={"name": "grid", "points": 2})
    before = moalign.sweep(settings, out=tmp_path / "run").front
    record = storage.read_json(tmp_path / "run" / "run.json")
    del record["config"]["reference"], record["reference"], record["guides"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert moalign.resume(tmp_path / "run").front["points"] == before["points"]


def test_folders_of_adapters_are_found_from_anywhere_later(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(
        "objectives: {a: }\nloss: {name: tgdpo, guide: runs/a}\nreference: {name: soup, shares: {runs/a: 1.0}}\n"
    )
    found = config.load(tmp_path / "sweep.yaml")
    assert found.loss.options["guide"] == str(folder)
    assert found.reference.options["shares"] == {str(folder): 1.0}

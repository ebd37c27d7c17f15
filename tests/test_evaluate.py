"""``moalign evaluate`` on small runs: what is measured, what is missing, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from sweeps import small_config, write_pairs
from typer.testing import CliRunner

import moalign
from moalign import registry, storage
from moalign.cli import app
from moalign.config import PluginChoice
from moalign.diagnostics.evaluation import evaluate
from moalign.diagnostics.question import Question, rewards_of
from moalign.errors import ConfigError, DataError, RunError, UserError
from moalign.sweeps import journal

LETTERS = PluginChoice.model_validate({"name": "regex", "pattern": "[a-c]"})
REWARDS = {"helpful": PluginChoice(name="length"), "gold": LETTERS}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("more") / "pairs.jsonl", prompts=6, seed=1)


@pytest.fixture(scope="module")
def asked(small_run, pairs):
    """All that can be said, once for all tests."""
    question = Question(data=pairs, rewards=REWARDS, gold="gold", threshold=-1.0, correct=0.5, wished=1, samples=5)
    return evaluate(small_run, registry.discover(), question)


def told_of(run, candidate):
    return next(event for event in journal.read(run / journal.FILE) if event.get("id") == candidate)


def test_every_policy_is_asked_everything(asked):
    assert list(asked["policies"]) == ["base", "w-1.00-0.00", "w-0.00-1.00", "w-0.50-0.50"]
    assert asked["missing"] == [] and asked["rewards"] == ["helpful", "gold"] and asked["proxies"] == ["helpful"]
    assert asked["pairs"]["pairs"] == 12 and asked["samples"]["each"] == 5
    for told in asked["policies"].values():
        assert set(told["ranking"]) == {"harmless", "helpful"} and set(told["explicit"]["helpful"]) == {
            "helpful",
            "gold",
        }
        assert told["chi2"]["value"] is None or told["chi2"]["log_of_one_more"] >= told["kl"] - 1e-9
        assert 0 <= told["balance"]["helpful"]["score"] <= told["balance"]["helpful"]["best_score"] <= 1
        assert np.shape(told["distances"]) == (2, 2)
    json.dumps(asked, allow_nan=False)


def test_the_base_is_the_reference(asked):
    base = asked["policies"]["base"]
    assert base["kl"] == 0.0 == base["chi2"]["value"] and base["conflict"] is None
    for name, own in base["ranking"].items():
        assert own["preference_accuracy"]["value"] == 0.5 and own["of_these_turned"] == 0
        assert own["accuracy"] == asked["pairs"]["objectives"][name]["reference"]
    assert base["bounds"]["helpful"]["gold_gain"] == 0.0 >= base["bounds"]["helpful"]["gold_gain_at_least"]


def test_what_one_was_trained_for_it_prefers(asked):
    """Letters are helpful: an explicit reward of letters is right on every pair, and the implicit one learned it."""
    alone = asked["policies"]["w-0.00-1.00"]
    assert alone["ranking"]["helpful"]["preference_accuracy"]["value"] == 1.0
    assert alone["ranking"]["harmless"]["preference_accuracy"]["value"] == 0.0
    assert alone["explicit"]["helpful"]["gold"]["accuracy"]["value"] == 1.0
    ideal = asked["pairs"]["objectives"]["helpful"]["idealised"]
    assert [ideal[beta]["value"] for beta in ("0.01", "10")] == [1.0, pytest.approx(0.5, abs=0.5)]
    for name in ("w-1.00-0.00", "w-0.00-1.00", "w-0.50-0.50"):
        found = np.array(asked["policies"][name]["conflict"]["cosines"])
        assert found[0, 1] == found[1, 0] < -0.5, "they judge the same pairs the other way round"


def test_without_data_the_journal_still_tells(small_run):
    """And no model is loaded."""
    found = evaluate(small_run, registry.discover(), Question())
    assert found["policies"] == {} and len(found["points"]) == 4 and found["curves"] == {}
    assert any("is not there" in each and "--data FILE" in each for each in found["missing"])
    assert any("no objective has a reward" in each for each in found["missing"])
    kl = {point["id"]: point["kl"] for point in found["points"]}
    assert kl["base"] == 0.0 and kl["w-1.00-0.00"] == told_of(small_run, "w-1.00-0.00")["kl"]
    assert found["points"][0]["id"] == "base"


def test_data_without_pairs_says_so_and_samples_all_the_same(small_run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"q{n}: "}) + "\n" for n in range(3)))
    question = Question(candidate="w-0.50-0.50", data=tmp_path / "prompts.jsonl", rewards=REWARDS, samples=2)
    found = evaluate(small_run, registry.discover(), question)
    assert found["pairs"] is None and found["policies"]["w-0.50-0.50"]["ranking"] is None
    assert found["policies"]["w-0.50-0.50"]["lengths"]["mean"] > 0
    assert any("no labelled pairs" in each for each in found["missing"])
    assert any("no conflict matrix" in each for each in found["missing"])


def test_the_same_samples_as_the_run_took(tiny_model_path, tmp_path):
    """Of its own data and rewards: KL and mean rewards are those in the journal."""
    file = write_pairs(tmp_path / "pairs.jsonl", prompts=10)
    objectives = {
        "helpful": {"reward": {"name": "regex", "pattern": "[a-c]"}},
        "harmless": {"reward": "length", "direction": "min"},
    }
    more = {"objectives": objectives, "loss": {"name": "rebel", "beta": 0.1}, "search": {"name": "grid", "points": 2}}
    run = moalign.sweep(small_config(tiny_model_path, file, **more), tmp_path / "run").directory
    found = evaluate(run, registry.discover(), Question())
    for name in found["candidates"]:
        event, told = told_of(run, name), found["policies"][name]
        assert told["kl"] == pytest.approx(event["kl"], abs=1e-5)
        for objective, score in event["scores"].items():
            assert told["rewards"][objective]["value"] == pytest.approx(score, abs=1e-9)
        assert told["conflict"]["on"] == "labelled pairs"
    assert found["missing"] == [] and set(found["curves"]) == {"harmless", "helpful"}
    assert "too few" in found["curves"]["helpful"]["note"] or found["curves"]["helpful"]["a"] is None


def test_a_run_that_games_its_reward_raises_the_alarm(small_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(small_run, copy)
    rows = [{"step": n, "helpful/accuracy": n / 40, "helpful/ranking_accuracy": 1 - n / 40} for n in range(40)]
    file = copy / "candidates" / "w-0.50-0.50" / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (alarm,) = evaluate(copy, registry.discover(), Question(candidate="w-0.50-0.50"))["alarms"]
    assert (alarm["rising"], alarm["falling"]) == ("helpful/accuracy", "helpful/ranking_accuracy")
    assert alarm["along"] == "training of w-0.50-0.50" and alarm["from"] == "step 0" and alarm["to"] == "step 35"


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_words_and_writes_numbers(small_run, pairs, tmp_path):
    out = tmp_path / "found.json"
    options = ["--data", str(pairs), "--samples", "2", "--reward", "helpful=length", "--candidate", "w-0.00-1.00"]
    done = CliRunner().invoke(app, ["evaluate", str(small_run), *options, "--out", str(out)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    for said in ("w-0.00-1.00", "prefers", "cosine of gradients", "against each other", "no alarm", "tokens"):
        assert said in done.output, done.output
    assert len(done.output.splitlines()) < 40
    found = storage.read_json(out)
    assert list(found["policies"]) == ["base", "w-0.00-1.00"]


def test_what_was_computed_is_shown_though_it_cannot_be_written(small_run, tmp_path):
    done = CliRunner().invoke(app, ["evaluate", str(small_run), "--json", "--out", str(tmp_path)])
    assert done.exit_code != 0 and len(json.loads(done.stdout)["points"]) == 4
    assert isinstance(done.exception, RunError) and f"cannot write {tmp_path}" in str(done.exception)


def test_what_is_mistyped_is_refused_before_a_model_is_loaded(small_run, pairs, monkeypatch, tmp_path):
    monkeypatch.setattr("moalign.sweeps.side_by_side.load", None)
    installed = registry.discover()
    with pytest.raises(RunError, match=r"no candidate 'w-0.5'; there are w-1.00-0.00"):
        evaluate(small_run, installed, Question(candidate="w-0.5"))
    with pytest.raises(UserError, match=r"--gold golden: no reward has this name; there are helpful, gold.*'gold'"):
        evaluate(small_run, installed, Question(data=pairs, rewards=REWARDS, gold="golden"))
    with pytest.raises(UserError, match=r"--gold helpful: .* there is none; give it one: --reward helpful=PLUGIN"):
        evaluate(small_run, installed, Question(data=pairs, gold="helpful"))
    with pytest.raises(UserError, match="--proxy gold: it is the gold reward itself"):
        evaluate(small_run, installed, Question(data=pairs, rewards=REWARDS, proxy="gold", gold="gold"))
    with pytest.raises(UserError, match=r"--share 0\.3"):
        evaluate(small_run, installed, Question(data=pairs, share=0.3))
    with pytest.raises(UserError, match="--correct"):
        evaluate(small_run, installed, Question(data=pairs, rewards=REWARDS, gold="gold", threshold=1.0))
    with pytest.raises(DataError, match="no such file"):
        evaluate(small_run, installed, Question(data=tmp_path / "nowhere.jsonl"))


def test_rewards_are_written_as_in_a_configuration():
    found = rewards_of(["gold={name: regex, pattern: 'a=b'}", "helpful = length"])
    assert found["gold"].options == {"pattern": "a=b"} and found["helpful"] == PluginChoice(name="length")
    for wrong in (["gold"], ["gold="], ["gold=[1]"], ["gold={pattern: a}"], ["gold={"], ["a=length", "a=length"]):
        with pytest.raises(ConfigError, match="--reward"):
            rewards_of(wrong)

"""Rewards that are given to ``moalign.sweep`` as Python callables."""

from __future__ import annotations

import functools
import json
import sys

import pytest
from interruptions import StopAfterCandidates
from sweeps import contents, small_config

import moalign
from moalign import registry, storage
from moalign.errors import ConfigError, RunError
from moalign.sweeps import callables, run
from moalign.sweeps.observe import Observer


def letters(samples):
    return [float(sum(character.isalpha() for character in sample.response)) for sample in samples]


async def digits(samples):
    return [float(sum(character.isdigit() for character in sample.response)) for sample in samples]


REWARDS = {"letters": letters, "digits": digits}


@pytest.fixture
def settings(tiny_model_path, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"q{number}: "}) + "\n" for number in range(8)))
    return small_config(
        tiny_model_path,
        prompts,
        objectives={"letters": None, "digits": None},
        search={"name": "grid", "points": 2},
        train={"steps": 2, "lr": 1e-2, "together": 1},
        loss="rloo",
        rollouts={"rounds": 1, "samples": 3, "prompts": 4, "prompts_per_step": 2, "max_new_tokens": 5},
    )


def test_a_run_with_callables_goes_on_with_the_same_and_with_nothing_else(settings, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert len(moalign.sweep(settings, whole, rewards=REWARDS).front["points"]) == 2
    with pytest.raises(KeyboardInterrupt):
        moalign.sweep(settings, cut, rewards=REWARDS, observer=StopAfterCandidates())

    record = storage.read_json(cut / "run.json")
    assert record["config"]["objectives"]["letters"]["reward"] == {"name": "python:letters()"}
    assert record["plugins"]["reward python:letters()"]["sha256"] == storage.sha256_of(__file__)

    with pytest.raises(RunError, match=r'go on from Python.*rewards=\{"digits": \.\.\., "letters": \.\.\.\}\)$'):
        run.resume(cut, registry.discover(), Observer())
    with pytest.raises(RunError, match="the reward of digits was a Python callable"):
        moalign.resume(cut, rewards={"letters": letters})
    monkeypatch.setattr(sys.modules[__name__], "__file__", str(tmp_path / "prompts.jsonl"))
    with pytest.raises(RunError, match="plugins changed since this run was started"):
        moalign.resume(cut, rewards=REWARDS)
    monkeypatch.undo()
    moalign.resume(cut, rewards=REWARDS)
    assert contents(cut) == contents(whole)


def test_a_run_without_callables_takes_none(settings, tmp_path):
    with pytest.raises(RunError, match=r"python:digits\(\) is given"):
        callables.check(settings, callables.installed(registry.discover(), REWARDS), tmp_path)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"letter": letters}, "no objective 'letter'; did you mean 'letters'"),
        ({"letters": "tests.test_rewards_callables:letters"}, "that of letters is a str; give a function"),
    ],
)
def test_what_is_no_reward(settings, tmp_path, rewards, message):
    with pytest.raises(ConfigError, match=message):
        moalign.sweep(settings, tmp_path / "run", rewards=rewards)
    assert not (tmp_path / "run").exists()


def test_a_reward_cannot_be_both(settings, tmp_path):
    both = settings.model_copy(update={"objectives": callables.chosen(settings, REWARDS).objectives})
    with pytest.raises(ConfigError, match=r"objectives\.digits\.reward: stands in the configuration"):
        moalign.sweep(both, tmp_path / "run", rewards={"digits": digits})


def test_a_name_in_a_configuration_imports_nothing(settings, tmp_path):
    named = callables.chosen(settings, REWARDS)
    with pytest.raises(registry.UnknownPluginError, match=r"no reward is called 'python:digits\(\)'"):
        run.start(named, tmp_path / "run", registry.discover(), Observer())


def test_partial_functions_and_their_own_word_on_chance():
    def noisy(samples, width):
        return [0.0] * width

    noisy.deterministic = False
    installed = callables.installed(registry.discover(), {"a": functools.partial(noisy, width=2), "b": noisy})
    one, other = (installed.build("reward", f"python:{name}()", {}, "key") for name in "ab")
    assert (one.deterministic, other.deterministic) == (True, False)
    assert one.score([None, None]) == [0.0, 0.0]

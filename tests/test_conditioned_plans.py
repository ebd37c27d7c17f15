"""One model for many preferences: what does not go with it, and what is known before it is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conditioned import EQUAL, ONLINE, TEXT, WAYS, settings
from sweeps import small_config, write_pairs

from moalign import registry
from moalign.api import Sampler, Search
from moalign.errors import ConfigError, PluginError
from moalign.sweeps import conditions
from moalign.sweeps.candidate import batch_source
from moalign.sweeps.estimate import estimate
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import open_workshop
from moalign.types import Candidate


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


REFUSED = {
    "adapts to one preference": ({"combine": "dynamic-hypervolume", "loss": "grpo", **ONLINE}, "combine"),
    "none decides; leave it out": ({"train": {"early_stop": {}}}, "early_stop"),
    "which needs hidden and token_advantages": ({"loss": "ppo", **ONLINE}, "ppo"),
    "which needs greedy": ({"loss": "remax", **ONLINE}, "remax"),
    "trains no one-hot candidates": ({"combine": "modpo", "data": {"margins": "implicit"}}, "margins"),
    "a judgement of a pair has no direction": ({"condition": TEXT | {"angles": [0, 90]}}, "angles"),
    "a direction has length 1": (
        {"condition": {"name": "soup", "angles": [0, 90]}, "loss": "rebel", **ONLINE},
        "angles",
    ),
    "leave one out": (
        {"condition": TEXT | {"angles": [0, 90], "concentration": 0.5}, "loss": "rebel", **ONLINE},
        "concentration",
    ),
    "there are no rollouts; leave it out": ({"condition": {"name": "soup", "per_prompt": 2}}, "per_prompt"),
    "compares it with the policy that sampled it": (
        {"condition": {"name": "tags", "of": "rewards"}, "loss": "grpo", **ONLINE},
        "old_logps and reference",
    ),
    "draws preferences that combine 'worst-case' refuses": (
        {"combine": "worst-case", "loss": "grpo", **ONLINE},
        "worst",
    ),
    "a multiple of 2": ({"condition": {"name": "soup", "shared": 1}}, "shared"),
    "no two have one prompt": ({"condition": {"name": "tags", "of": "rewards"}, "loss": "sft"}, "tags"),
    "exactly two objectives, there are 3": (
        {
            "condition": {"name": "prompt-text", "angles": [0, 90]},
            "objectives": {name: {"reward": "length"} for name in "abc"},
            "loss": "rebel",
            "rollouts": ONLINE["rollouts"],
        },
        "angles",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_go_together_is_refused_before_a_model_is_loaded(reason, tiny_model_path, pairs):
    changes, key = REFUSED[reason]
    data = {"path": str(pairs), "held_out": 0.2} | changes.get("data", {})
    config = small_config(tiny_model_path, pairs, **({"condition": "soup"} | changes | {"data": data}))
    with pytest.raises(ConfigError, match=reason) as error:
        prepare(config, registry.discover())
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"), [("soup", "gates the adapter"), ("embedding", "has vectors in the place of tokens")]
)
def test_a_sampler_of_its_own_is_refused_where_rows_are_conditioned(name, reason, tiny_model_path, pairs):
    class Own(Sampler):
        def start(self, info):
            raise AssertionError("nobody is to be asked")

    installed = registry.discover()
    installed = registry.Registry((*installed.entries, registry.Entry("sampler", "own", Own, "own", "", "here", "1.0")))
    online = ONLINE | {"rollouts": ONLINE["rollouts"] | {"sampler": "own"}}
    config = small_config(tiny_model_path, pairs, condition=name, loss="rebel", **online)
    with pytest.raises(ConfigError, match=f"rollouts.sampler: condition: '{name}' {reason} for each prompt"):
        prepare(config, installed)


def opened(model_path, pairs, tmp_path, **changes):
    plan = prepare(small_config(model_path, pairs, **changes), registry.discover())
    return open_workshop(plan, tmp_path, Observer(), keep_cache=False)


def test_gates_do_not_reach_the_output_head(tiny_model_path, pairs, tmp_path):
    model = {"path": str(tiny_model_path), "lora": {"r": 4, "targets": ["q_proj", "lm_head"]}}
    with pytest.raises(ConfigError, match="the output head carries an adapter; leave that out"):
        opened(tiny_model_path, pairs, tmp_path, condition="soup", model=model)


def test_a_rule_that_needs_rewards_says_that_there_are_none(tiny_model_path, pairs, tmp_path):
    with pytest.raises(ConfigError, match="there are none for harmless and helpful; with condition no one-hot"):
        opened(tiny_model_path, pairs, tmp_path, condition="soup", combine="modpo")


def test_rules_whose_state_is_not_a_preferences_go_with_it(tiny_model_path, pairs):
    for rule in ("chebyshev", "log-sigmoid", {"name": "product", "penalties": ["helpful"]}):
        config = small_config(tiny_model_path, pairs, condition="soup", combine=rule, loss="grpo", **ONLINE)
        assert prepare(config, registry.discover()).propose(())


@pytest.mark.parametrize("way", ["text, from pairs", "text, regression online"])
def test_long_prompts_lose_their_beginning_and_not_the_text(way, tiny_model_path, tmp_path):
    """Nothing is longer than data.max_length, and what was cut is counted."""
    file = tmp_path / "long.jsonl"
    rows = []
    for number in range(12):
        prompt = f"{'long ' * (8 * (number % 3))}q{number}: "
        for objective, chosen, rejected in (("helpful", "abc", "12"), ("harmless", "12", "abc")):
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "objective": objective})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(file), "held_out": 0.3, "max_length": 84}
    made = opened(tiny_model_path, file, tmp_path, **(WAYS[way] | {"data": data}))
    assert any("lost" in reason or "truncated" in reason for reason in made.material.counts)
    decode = made.model.tokeniser.tokenizer.decode
    for step in (0, 5):
        for sequence in batch_source(EQUAL, made).at(step)[0].sequences:
            assert len(sequence.ids) <= 84
            assert decode(sequence.prompt, skip_special_tokens=True).startswith("harmless*")
    made.evaluate("candidate", wanted=EQUAL.preference)


def test_searches_that_train_candidates_each_in_their_own_way_are_refused(tiny_model_path, pairs):
    class Shorter(Search):
        def propose(self, space, history, rng):
            return [Candidate("short", EQUAL.preference, changes={"train.steps": 3})]

    plan = prepare(small_config(tiny_model_path, pairs, condition="soup"), registry.discover())
    with pytest.raises(PluginError, match="one model is trained and the search only asks it"):
        replace(plan, search=Shorter()).propose(())


def test_points_that_a_search_would_mix_are_asked_of_the_model_too(tiny_model_path, pairs):
    config = small_config(tiny_model_path, pairs, condition="soup", search={"name": "soup", "points": 3})
    proposed = prepare(config, registry.discover()).propose(())
    assert [candidate.kind for candidate in proposed] == ["trained"] + ["conditioned"] * (len(proposed) - 1)
    assert (proposed[0].id, proposed[1].parents) == (conditions.MODEL, (conditions.MODEL,))


def test_the_first_round_asks_the_base_without_the_text_and_trains_behind_it(tiny_model_path, pairs, tmp_path):
    """What the policy sampled from is the reference, so that its log-probabilities are the old ones."""
    way = WAYS["text, regression online"] | {"loss": "grpo"}
    plan = prepare(small_config(tiny_model_path, pairs, **way), registry.discover())
    workshop = open_workshop(plan, tmp_path, Observer(), keep_cache=False)
    made = batch_source(EQUAL, workshop)
    asked = made.asked(0)
    assert [question.ids for question in asked] == [made.prompts[question.prompt] for question in asked]
    assert all(question.ids == question.told for question in made.asked(1))
    dataset, _ = made.at(0)
    decode = workshop.model.tokeniser.tokenizer.decode
    assert all("harmless*" in decode(sequence.prompt) for sequence in dataset.sequences)
    for old, reference in zip(dataset.old_logps, dataset.ref_logps, strict=True):
        np.testing.assert_array_equal(old, reference)


def test_the_estimate_is_of_one_training_and_an_evaluation_for_each_point(tiny_model_path, pairs):
    found = estimate(
        prepare(settings(tiny_model_path, pairs, "panacea, regression online"), registry.discover()), Observer()
    )
    assert len(found.candidates) == 4
    assert found.steps == (6,)
    assert found.together == 1
    training = 6 * found.seconds_per_step + found.seconds_of_sampling
    assert found.seconds == pytest.approx(training + 4 * found.seconds_per_evaluation)
    assert 0 < found.seconds < 600

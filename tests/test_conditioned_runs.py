"""One model for many preferences, as a run: trained, asked, resumed, steered; and what does not go with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptions import StopAfterCandidates, StopAfterSteps
from peft import PeftModel
from sweeps import contents, small_config, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

import moalign
from moalign import registry, storage
from moalign.api import Sampler, Search
from moalign.config import Config
from moalign.engine.conditioned import ConditionedPairs, ConditionedRollouts
from moalign.engine.replies import Manner, Speaker
from moalign.engine.scoring import logps_under
from moalign.errors import ConfigError, CorruptFileError, PluginError, PreferenceError
from moalign.lora import gated
from moalign.sweeps import conditions, run, steering
from moalign.sweeps.archive import Archive
from moalign.sweeps.candidate import batch_source
from moalign.sweeps.estimate import estimate
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import open_workshop
from moalign.types import Candidate, Preference

NAMES = ("harmless", "helpful")
TEXT = {"name": "prompt-text", "template": "{weights};"}
ONLINE: dict[str, Any] = {
    "objectives": {"helpful": {"reward": "length"}, "harmless": {"reward": "length", "direction": "min"}},
    "rollouts": {"rounds": 2, "samples": 3, "prompts": 5, "prompts_per_step": 4, "max_new_tokens": 5},
}
WAYS: dict[str, dict[str, Any]] = {
    "text, from pairs": {"condition": TEXT},
    "soup, from pairs": {"condition": "soup"},
    "panacea, regression online": {"condition": "panacea", "loss": "rebel", **ONLINE},
    "hypernetwork, policy gradient": {"condition": {"name": "hypernetwork", "per_prompt": 2}, "loss": "grpo", **ONLINE},
    "text, regression online": {"condition": TEXT, "loss": "rebel", **ONLINE},
    "directions, rejection sampling": {
        "condition": TEXT | {"angles": [-45, 90]},
        "loss": "rejection-sampling",
        **ONLINE,
    },
    "embedding, from pairs": {"condition": {"name": "embedding", "tokens": 2, "lr_scale": 3}},
    "embedding, policy gradient": {"condition": {"name": "embedding", "per_prompt": 2}, "loss": "grpo", **ONLINE},
    "rewards in context": {
        "condition": {"name": "tags", "of": "rewards", "ranges": {"helpful": [0, 5], "harmless": [-5, 0]}},
        "loss": {"name": "rejection-sampling", "keep": 3},
        **ONLINE,
    },
}
EQUAL = Candidate("model", Preference("weights", dict.fromkeys(NAMES, 0.5), "equal"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def settings(model_path: Path, pairs: Path, way: str, **changes: Any) -> Config:
    return small_config(model_path, pairs, **(WAYS[way] | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_path, pairs):
    """A run of each way, made when it is first asked for; its folder is to be read only."""
    made: dict[str, Path] = {}

    def of(way: str) -> Path:
        if way not in made:
            made[way] = tmp_path_factory.mktemp("conditioned") / "run"
            moalign.sweep(settings(tiny_model_path, pairs, way), made[way])
        return made[way]

    return of


@pytest.mark.parametrize("way", WAYS)
def test_one_candidate_is_trained_and_the_others_are_asked_of_it(finished, way):
    points = moalign.open_run(finished(way)).front["points"]
    (model, *asked) = points
    assert (model["id"], model["kind"]) == ("model", "trained")
    assert model["tokens"] > 0
    assert [point["id"] for point in asked] == ["w-1.00-0.00", "w-0.00-1.00", "w-0.50-0.50"]
    for point in asked:
        assert (point["kind"], point["parents"], point["tokens"]) == ("conditioned", {"model": 1.0}, 0)
    equal = asked[-1]
    assert equal["scores"] == model["scores"]
    assert equal["kl"] == pytest.approx(model["kl"], abs=1e-6)


@pytest.mark.parametrize("way", ["soup, from pairs", "panacea, regression online", "hypernetwork, policy gradient"])
def test_each_point_has_the_plain_adapter_of_its_gates(finished, way, tiny_model_path):
    """Of unseen preferences as well, and plain peft loads both."""
    directory = finished(way)
    archive = Archive.open(directory)
    for point in moalign.open_run(directory).front["points"]:
        own, _ = steering.adapter(archive, archive.of_candidate(point["id"]))
        asked, _ = steering.adapter(archive, archive.for_preference(point["preference"]["values"]))
        assert all(torch.equal(own.tensors[name], asked.tensors[name]) for name in own.tensors)
    ends = [steering.adapter(archive, archive.for_preference(name))[0].tensors for name in NAMES]
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    model, _ = moalign.open_run(directory).load(helpful=0.37, harmless=0.63)
    exported = moalign.open_run(directory).export(directory.parent / "exported", helpful=0.37, harmless=0.63)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        found, expected = PeftModel.from_pretrained(base, exported).eval()(ids).logits, model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["text, from pairs", "directions, rejection sampling"])
def test_a_model_that_is_told_in_text_has_one_adapter_and_a_text_for_each(finished, way):
    archive = Archive.open(finished(way))
    first, *others = [steering.verified(archive, name).tensors for name in archive.finished()]
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)
    assert steering.text(archive, archive.for_preference("helpful")) == "harmless*0 + helpful*100;"
    assert steering.text(archive, archive.of_candidate("w-1.00-0.00")) == "harmless*100 + helpful*0;"
    assert steering.text(archive, archive.for_preference({"angle": -45})) == "harmless*71 + helpful*-71;"


@pytest.mark.parametrize(
    "way",
    ["soup, from pairs", "text, regression online", "hypernetwork, policy gradient", "embedding, policy gradient"],
)
@pytest.mark.parametrize(("kind", "number"), [(StopAfterSteps, 4), (StopAfterCandidates, 1), (StopAfterCandidates, 3)])
def test_an_interrupted_run_ends_as_an_unbroken_one(finished, way, kind, number, tiny_model_path, pairs, tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run.start(settings(tiny_model_path, pairs, way), directory, registry.discover(), kind(number))
    run.resume(directory, registry.discover(), Observer())
    assert contents(directory) == contents(finished(way))


@pytest.mark.parametrize("way", ["soup, from pairs", "embedding, from pairs"])
def test_the_model_learns_to_follow_preferences_that_it_was_not_trained_on(tiny_model_path, pairs, tmp_path, way):
    """Letters against digits: each objective's accuracy rises with its weight, over weights that nobody drew."""
    train = {"steps": 60, "pairs_per_step": 8, "lr": 1e-2}
    search = {"name": "grid", "points": 5}
    moalign.sweep(settings(tiny_model_path, pairs, way, train=train, search=search), tmp_path / "run")
    points = moalign.open_run(tmp_path / "run").front["points"][1:]
    for name in NAMES:
        ordered = sorted(points, key=lambda point: point["preference"]["values"][name])
        scores = [point["scores"][name] for point in ordered]
        assert scores == sorted(scores)
        assert scores[0] < 0.3
        assert scores[-1] > 0.7


# --- batches --------------------------------------------------------------------------------------------------------


def source(model_path: Path, pairs: Path, way: str, tmp_path: Path) -> Any:
    plan = prepare(settings(model_path, pairs, way), registry.discover())
    return batch_source(EQUAL, open_workshop(plan, tmp_path, Observer(), keep_cache=False))


def test_the_pairs_of_a_prompt_are_judged_for_one_drawn_preference(tiny_model_path, pairs, tmp_path):
    made, again = (source(tiny_model_path, pairs, "soup, from pairs", tmp_path) for _ in range(2))
    assert isinstance(made, ConditionedPairs)
    (first, chosen), (second, _) = made.at(0), made.at(1)
    rows = first.pairs[chosen].flatten()
    by_prompt = {group: first.preference[first.groups == group] for group in first.groups[rows]}
    assert all(len(np.unique(values, axis=0)) == 1 for values in by_prompt.values())
    assert len({tuple(values[0]) for values in by_prompt.values()}) == len(by_prompt) > 2
    np.testing.assert_allclose(first.preference[rows].sum(1), 1.0)
    assert not np.array_equal(first.preference[rows], second.preference[rows])
    np.testing.assert_array_equal(first.preference, again.at(0)[0].preference)


def test_the_reference_reads_the_prompt_without_the_text(tiny_model_path, pairs, tmp_path):
    made = source(tiny_model_path, pairs, "text, from pairs", tmp_path)
    part, chosen = made.at(0)
    assert len(chosen) == len(part.pairs) == 8
    decode = made.model.tokeniser.tokenizer.decode
    for row, told in enumerate(part.sequences):
        text = decode(told.prompt, skip_special_tokens=True)
        numbers = [int(each.rpartition("*")[2]) for each in text.partition(";")[0].split(" + ")]
        wanted = part.preference[row] / np.linalg.norm(part.preference[row])
        assert numbers == [round(100 * value) for value in wanted]
        assert text.partition(";")[2] == part.samples[row].prompt
    plain = [
        next(
            each for each in made.dataset.sequences if decode(each.ids) == "<s>" + sample.prompt + decode(told.response)
        )
        for sample, told in zip(part.samples, part.sequences, strict=True)
    ]
    (expected,) = logps_under(made.model, plain, part.groups.tolist(), (None,))
    for found, own in zip(part.ref_logps, expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)


def test_a_round_asks_each_prompt_for_as_many_preferences_as_it_says(tiny_model_path, pairs, tmp_path):
    made = source(tiny_model_path, pairs, "hypernetwork, policy gradient", tmp_path)
    assert isinstance(made, ConditionedRollouts)
    dataset, chosen = made.at(0)
    assert len(np.unique(dataset.groups)) == 10
    assert len(np.unique(dataset.preference, axis=0)) == 10
    assert len({sequence.prompt for sequence in dataset.sequences}) == 5
    assert len(chosen) == 4 * 3
    # an advantage is that of the reward for the response's own preference: over its group it is standardised
    for group in np.unique(dataset.groups):
        rows = dataset.groups == group
        signal = (dataset.preference[rows] * dataset.rewards[rows]).sum(1)
        expected = (signal - signal.mean()) / (signal.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(dataset.advantages[rows], expected, atol=1e-9)


def test_rewards_in_context_train_a_response_behind_the_rewards_that_it_got(tiny_model_path, pairs, tmp_path):
    made = source(tiny_model_path, pairs, "rewards in context", tmp_path)
    dataset, _ = made.at(0)
    decode = made.model.tokeniser.tokenizer.decode
    for sequence, rewards in zip(dataset.sequences, dataset.rewards, strict=True):
        harmless, helpful = rewards
        levels = f"<harmless {round(2 * (harmless + 5))}> <helpful {round(2 * helpful)}> "
        assert decode(sequence.prompt, skip_special_tokens=True).startswith(levels)


# --- steering -------------------------------------------------------------------------------------------------------


def test_generate_says_what_stands_in_front_of_the_prompt(finished):
    directory = finished("text, from pairs")
    command = [sys.executable, "-m", "moalign", "generate", str(directory), "--prefer", "helpful=0.8,harmless=0.2"]
    done = subprocess.run([*command, "--prompt", "q1: ", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "in front of every prompt: 'harmless*24 + helpful*97;'" in done.stderr
    model, tokenizer = moalign.open_run(directory).load(prefer="helpful")
    expected = Speaker(model, tokenizer, Manner()).reply("harmless*24 + helpful*97;q1: ")
    assert json.loads(done.stdout)["response"] == expected.text


def test_an_export_names_the_text(finished, tmp_path):
    run_ = moalign.open_run(finished("text, from pairs"))
    note = storage.read_json(run_.export(tmp_path / "one", helpful=0.5, harmless=0.5) / "moalign.json")
    assert note["text"] == "harmless*71 + helpful*71;"
    bundle = run_.bundle(tmp_path / "all", everything=True)
    assert [entry["text"] for entry in bundle["adapters"]][:2] == [
        "harmless*71 + helpful*71;",
        "harmless*100 + helpful*0;",
    ]


def test_thresholds_and_decoders_for_text_are_refused(finished):
    run_ = moalign.open_run(finished("text, from pairs"))
    with pytest.raises(PreferenceError, match=r"told weights or a direction; `moalign select --at-least`"):
        run_.load(prefer="helpful>=0.5")
    with pytest.raises(PreferenceError, match="told its preference in text; ask it without a decoder"):
        run_.decoder("multi-objective", prefer="equal")


@pytest.mark.parametrize("way", ["soup, from pairs", "embedding, from pairs"])
def test_a_damaged_family_is_named(finished, tmp_path, way):
    copy = Path(shutil.copytree(finished(way), tmp_path / "run"))
    file = copy / "candidates" / "model" / gated.FILE
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptFileError, match=gated.FILE):
        moalign.open_run(copy).load(helpful=0.9, harmless=0.1)


def test_the_tokenizer_is_that_of_the_base(finished, tiny_model_path):
    _, tokenizer = moalign.open_run(finished("soup, from pairs")).load(prefer="helpful")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_model_path).get_vocab()


# --- what does not go with it ---------------------------------------------------------------------------------------

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


def test_directions_are_told_in_text_alone(finished):
    with pytest.raises(PreferenceError, match="told weights that sum to 1; write weights"):
        moalign.open_run(finished("soup, from pairs")).load(prefer={"angle": 30})


def test_the_text_is_said_where_somebody_takes_the_adapter(finished, tmp_path):
    run_ = moalign.open_run(finished("text, from pairs"))
    assert run_.text(helpful=0.8, harmless=0.2) == "harmless*24 + helpful*97;"
    assert run_.text("w-1.00-0.00") == "harmless*100 + helpful*0;"
    assert moalign.open_run(finished("soup, from pairs")).text(prefer="helpful") == ""
    for further in (["--prefer", "helpful"], ["--bundle", "--all"]):
        command = [sys.executable, "-m", "moalign", "export", str(run_.directory), "--to", str(tmp_path / further[0])]
        done = subprocess.run([*command, *further], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "told its preference in text" in done.stderr


def test_decoders_say_that_there_is_one_model(finished):
    with pytest.raises(PreferenceError, match="one model for all preferences; ask it without a decoder"):
        moalign.open_run(finished("soup, from pairs")).decoder("multi-objective", prefer="equal")


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

"""One model for many preferences, as a run: trained, asked, resumed, steered; and what does not go with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch
from conditioned import EQUAL, NAMES, WAYS, runs_of, settings
from interruptions import StopAfterCandidates, StopAfterSteps
from peft import PeftModel
from sweeps import contents, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

import moalign
from moalign import registry, storage
from moalign.engine.conditioned import ConditionedPairs, ConditionedRollouts
from moalign.engine.replies import Manner, Speaker
from moalign.engine.scoring import logps_under
from moalign.errors import CorruptFileError, PreferenceError
from moalign.lora import gated
from moalign.sweeps import run, steering
from moalign.sweeps.archive import Archive
from moalign.sweeps.candidate import batch_source
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import prepare
from moalign.sweeps.workshop import open_workshop


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_path, pairs):
    return runs_of(WAYS, tiny_model_path, pairs, tmp_path_factory)


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
    asked = ("generate", directory, "--prefer", "helpful=0.8,harmless=0.2")
    done = command_line.moalign(*asked, "--prompt", "q1: ", "--json")
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


def test_directions_are_told_in_text_alone(finished):
    with pytest.raises(PreferenceError, match="told weights that sum to 1; write weights"):
        moalign.open_run(finished("soup, from pairs")).load(prefer={"angle": 30})


def test_the_text_is_said_where_somebody_takes_the_adapter(finished, tmp_path):
    run_ = moalign.open_run(finished("text, from pairs"))
    assert run_.text(helpful=0.8, harmless=0.2) == "harmless*24 + helpful*97;"
    assert run_.text("w-1.00-0.00") == "harmless*100 + helpful*0;"
    assert moalign.open_run(finished("soup, from pairs")).text(prefer="helpful") == ""
    for further in (["--prefer", "helpful"], ["--bundle", "--all"]):
        done = command_line.moalign("export", run_.directory, "--to", tmp_path / further[0], *further)
        assert done.returncode == 0, done.stderr
        assert "told its preference in text" in done.stderr


def test_decoders_say_that_there_is_one_model(finished):
    with pytest.raises(PreferenceError, match="one model for all preferences; ask it without a decoder"):
        moalign.open_run(finished("soup, from pairs")).decoder("multi-objective", prefer="equal")

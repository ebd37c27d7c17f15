"""Decoders on a run directory alone, without the training data."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from sweeps import small_config, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

import moalign
from moalign import registry, storage
from moalign.decode import Decoding, Request
from moalign.errors import (
    ConfigError,
    CorruptFileError,
    DataError,
    ModelError,
    PreferenceError,
    RunError,
    UnknownPluginError,
    UserError,
)
from moalign.sweeps import journal
from moalign.sweeps import run as runs
from moalign.sweeps.observe import Observer

ENDS = ("w-0.00-1.00", "w-1.00-0.00")  # harmless, helpful
MIDDLE = "w-0.50-0.50"
SHORT = {"max_new_tokens": 3}


@pytest.fixture(scope="module")
def trained(tiny_model_path, tmp_path_factory):
    """Three candidates; the first objective has a reward, and the data are gone."""
    folder = tmp_path_factory.mktemp("trained")
    pairs = write_pairs(folder / "pairs.jsonl")
    settings = small_config(
        tiny_model_path,
        pairs,
        objectives={"helpful": {"reward": {"name": "regex", "pattern": "[a-c]"}}, "harmless": None},
        preferences={"mine": {"helpful": 0.25, "harmless": 0.75}},
    )
    runs.start(settings, folder / "run", registry.discover(), Observer())
    pairs.unlink()
    shutil.rmtree(folder / "run" / "cache", ignore_errors=True)
    return moalign.open_run(folder / "run")


@pytest.fixture
def copy(trained, tmp_path):
    return moalign.open_run(shutil.copytree(trained.directory, tmp_path / "run"))


def change(run, **changes):
    """What ``run.json`` says, of its configuration with dots for the way to a key."""
    record = storage.read_json(run.directory / "run.json")
    for key, value in changes.items():
        *way, last = key.split("__")
        held = record
        for part in way:
            held = held[part]
        held[last] = value
    storage.write_json(run.directory / "run.json", record)


def test_a_preference_falls_between_trained_candidates(trained):
    decoding = trained.decoder("multi-objective", prefer="mine")
    assert dict(decoding.request.shares) == {"w-0.50-0.50": pytest.approx(0.5), "w-1.00-0.00": pytest.approx(0.5)}
    assert dict(decoding.request.preference) == {"harmless": 0.75, "helpful": 0.25}
    first = decoding.generate(["q1: ", "q2: "], max_new_tokens=6, seed=2)
    assert first == trained.decoder("multi-objective", prefer={"helpful": 1 / 4, "harmless": "3/4"}).generate(
        ["q1: ", "q2: "], max_new_tokens=6, seed=2
    )
    model, tokenizer = decoding.model, decoding.tokenizer
    inputs = tokenizer(["q1: "], return_tensors="pt")
    said = model.generate(
        **inputs, logits_processor=[decoding.processor()], max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert said.shape[0] == 1


@pytest.mark.parametrize("candidate", ENDS)
def test_a_trained_preference_is_its_candidate(trained, candidate):
    """As ``run.load`` loads it, spoken by the decoder that changes nothing."""
    preference = {"w-0.00-1.00": "helpful", "w-1.00-0.00": "harmless"}[candidate]
    decoding = trained.decoder("multi-objective", prefer=preference)
    assert dict(decoding.request.shares) == {candidate: 1.0}
    model, tokenizer = trained.load(candidate)
    (name,) = model.peft_config
    alone = Decoding(decoding.decoder, Request(shares={name: 1.0}), model, tokenizer)
    options = {"max_new_tokens": 8, "seed": 4}
    assert decoding.generate(["q1: ", "q7: "], **options) == alone.generate(["q1: ", "q7: "], **options)


def test_what_is_chosen_is_chosen_by_the_runs_rewards(trained):
    """One with a letter from a to c, where one of the samples has one."""
    found = {}
    for n in (1, 30):
        decoding = trained.decoder("best-of-n", prefer="helpful", n=n, candidate=ENDS[1])
        (found[n],) = decoding.generate(["q1: "], max_new_tokens=3)
    assert found[1].rewards == {} and found[30].rewards == {"helpful": 1.0}
    assert set(found[30].text) & set("abc")


def test_values_and_guidance(trained):
    values = {"helpful": lambda hidden: hidden.sum(-1)}
    raised = trained.decoder("value-augmented", prefer="helpful", values=values, top_k=4)
    assert len(raised.generate(["q1: "], max_new_tokens=3)) == 1
    guided = trained.decoder("guidance", prefer="helpful", scale=1.0).generate(["q1: "], max_new_tokens=6)
    assert guided == trained.decoder("multi-objective", prefer="helpful").generate(["q1: "], max_new_tokens=6)


def test_generators_and_gradients_are_left_alone(trained):
    random.seed(0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    decoding = trained.decoder("multi-objective", prefer="equal")
    decoding.generate(["q1: "], max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in decoding.model.parameters())


def test_what_cannot_be_asked_for_is_refused(trained, tmp_path, tiny_model_path):
    with pytest.raises(UnknownPluginError, match=r"decoder multi.name: no decoder is called 'multi'"):
        trained.decoder("multi", prefer="helpful")
    with pytest.raises(ConfigError, match=r"decoder best-of-n.*\bm\b"):
        trained.decoder("best-of-n", prefer="helpful", m=3)
    with pytest.raises(PreferenceError, match="asked for weights, not for a preference of the kind direction"):
        trained.decoder("multi-objective", prefer={"angle": 120})
    with pytest.raises(RunError, match="no candidate 'w-9'; there are w-"):
        trained.decoder("best-of-n", prefer="helpful", candidate="w-9")
    with pytest.raises(ConfigError, match=r"objectives\.harmless has no reward in this run"):
        trained.decoder("best-of-n", prefer="equal")
    with pytest.raises(ConfigError, match=r"rewards: there is no objective 'helpfull'; did you mean 'helpful'"):
        trained.decoder("best-of-n", prefer="helpful", rewards={"helpfull": list})
    for device in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"device: '{device}' "):
            trained.decoder("multi-objective", prefer="helpful", device=device)


def test_a_preference_as_near_as_it_may_be_rounded_is_the_candidate(trained):
    near = moalign.types.Preference("weights", {"helpful": 0.5000004, "harmless": 0.4999996})
    assert dict(trained.decoder("multi-objective", prefer=near).request.shares) == {MIDDLE: 1.0}


# --- rewards ----------------------------------------------------------------------------------------------------------


def longest(samples):
    return [float(len(sample.response)) for sample in samples]


def test_functions_are_asked_in_the_place_of_the_runs_rewards(copy):
    """What ``run.json`` names is then not even looked up."""
    change(copy, config__objectives__helpful__reward={"name": "nobody-has-this"})
    with pytest.raises(UnknownPluginError, match="nobody-has-this"):
        copy.decoder("best-of-n", prefer="helpful")
    rewards = {"helpful": longest, "harmless": longest}
    (found,) = copy.decoder("best-of-n", prefer="equal", rewards=rewards).generate(["q1: "], **SHORT)
    assert found.rewards == dict.fromkeys(rewards, float(len(found.text)))


def test_a_callable_of_the_sweep_is_asked_for(copy):
    change(copy, config__objectives__helpful__reward={"name": "python:helpful()"})
    with pytest.raises(ConfigError, match=r'was a Python callable.*run\.decoder: rewards=\{"helpful": \.\.\.\}'):
        copy.decoder("best-of-n", prefer="helpful")
    (found,) = copy.decoder("best-of-n", prefer="helpful", rewards={"helpful": longest}).generate(["q1: "], **SHORT)
    assert found.rewards == {"helpful": float(len(found.text))}


def test_a_reward_that_fails_is_told_of(copy, caplog):
    def failing(samples):
        raise ValueError("100 % out of order")

    change(copy, config__objectives__helpful__on_error="skip_sample")
    best = copy.decoder("best-of-n", prefer="helpful", rewards={"helpful": failing})
    with pytest.raises(DataError, match="unknown for all"):
        best.generate(["q1: "], **SHORT)
    assert "100 % out of order" in caplog.text


# --- the base ---------------------------------------------------------------------------------------------------------


def test_a_base_that_has_moved_is_found_where_somebody_says(copy, tiny_model_path, caplog):
    change(copy, config__model__path=str(tiny_model_path / "gone"), tokenizer="0" * 64)
    with pytest.raises(ModelError, match=r"elsewhere now, say where \(--base, from Python base=\)"):
        copy.decoder("multi-objective", prefer="helpful")
    decoding = copy.decoder("multi-objective", prefer="helpful", base=tiny_model_path)
    assert decoding.generate(["q1: "], **SHORT) and "not the tokenizer of the run" in caplog.text


def test_the_precision_is_the_one_that_the_run_trained_on(tiny_model_path, tmp_path):
    """A run of an accelerator, which takes the base as it is stored, speaks on the CPU, where "auto" is float32."""
    stored = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16).save_pretrained(stored)
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(stored)
    settings = small_config(
        stored,
        write_pairs(tmp_path / "pairs.jsonl", prompts=10),
        model={"path": str(stored), "dtype": "bfloat16", "lora": {"r": 2, "alpha": 4}},
        search={"name": "grid", "points": 2},
        train={"steps": 1, "pairs_per_step": 4, "together": 1},
    )
    run = moalign.sweep(settings, tmp_path / "run")
    change(run, config__model__dtype="auto", device="cuda:0")
    decoding = run.decoder("multi-objective", prefer="helpful")
    assert decoding.model.dtype == torch.bfloat16 and decoding.generate(["q1: "], **SHORT)


# --- what is in a run directory is not trusted ------------------------------------------------------------------------


def test_adapters_are_those_that_the_journal_tells_of(copy):
    mine, other = (copy.directory / "candidates" / name for name in ENDS)
    shutil.copy(other / "adapter_model.safetensors", mine)
    (mine / "MANIFEST.json").unlink()
    storage.write_manifest(mine)
    with pytest.raises(CorruptFileError, match="not the adapter that the journal tells of"):
        copy.decoder("multi-objective", prefer="helpful")


def test_an_adapter_of_another_kind_is_refused(copy):
    folder = copy.directory / "candidates" / ENDS[0]
    file = folder / "adapter_config.json"
    storage.write_json(file, storage.read_json(file) | {"use_dora": True})
    (folder / "MANIFEST.json").unlink()
    storage.write_manifest(folder)
    with pytest.raises(RunError, match="use_dora is True"):
        copy.decoder("multi-objective", prefer="helpful")


def test_an_id_that_leaves_the_folder_is_refused(copy):
    shutil.copytree(copy.directory / "candidates" / MIDDLE, copy.directory / "outside")
    file = copy.directory / "journal.jsonl"
    events = json.loads(json.dumps(journal.read(file)).replace(MIDDLE, "../outside"))
    file.unlink()
    for event in events:
        journal.append(file, event)
    with pytest.raises(CorruptFileError, match="not the name of a folder"):
        copy.decoder("multi-objective", prefer="equal")


def test_exact_figures_say_nothing_but_figures(copy):
    """``world.json`` is signed by nobody: which points there are, and what they were trained for, the journal tells."""
    before = copy.front
    scores = {"helpful": 0.1, "harmless": 0.2}
    more = {"id": "../x", "kind": "mixed", "preference": {}, "parents": {"y": 1.0}}
    exact = {MIDDLE: {"scores": scores, "stderr": {}, "details": {"mass": 1.0}} | more}
    base = {"scores": scores, "stderr": {}}
    storage.write_json(
        copy.directory / "world.json", {"points": exact, "base": base, "front": {"objectives": [], "front_share": 0.5}}
    )
    after = copy.front
    assert after["objectives"] == before["objectives"] and after["front_share"] == 0.5
    own = ("id", "kind", "preference", "parents")
    assert [[point[key] for key in own] for point in after["points"]] == [
        [point[key] for key in own] for point in before["points"]
    ]
    assert after["points"][-1]["scores"] == scores and after["points"][-1]["details"]["mass"] == 1.0
    storage.write_json(copy.directory / "world.json", [])
    with pytest.raises(CorruptFileError, match="not those of a run"):
        print(copy.front)


def test_why_no_candidates_enclose_a_preference_is_said(copy):
    """The ends are gone, as where they have failed."""
    file = copy.directory / "journal.jsonl"
    events = journal.read(file)
    file.unlink()
    for event in events:
        if event.get("id") not in ENDS:
            journal.append(file, event)
    with pytest.raises(PreferenceError, match=r"nothing to mix.*lies outside of what the one trained candidate is for"):
        copy.decoder("multi-objective", prefer="helpful")

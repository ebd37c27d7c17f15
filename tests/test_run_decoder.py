"""Decoders on a run directory alone, without the training data."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from sweeps import small_config, write_pairs

import moalign
from moalign import registry
from moalign.decode import Decoding, Request
from moalign.errors import ConfigError, PreferenceError, RunError, UnknownPluginError
from moalign.sweeps import journal
from moalign.sweeps import run as runs
from moalign.sweeps.observe import Observer

ENDS = ("w-0.00-1.00", "w-1.00-0.00")  # harmless, helpful


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


def test_why_no_candidates_enclose_a_preference_is_said(trained, tmp_path):
    """The ends are gone, as where they have failed."""
    copy = tmp_path / "run"
    shutil.copytree(trained.directory, copy)
    events = journal.read(copy / "journal.jsonl")
    (copy / "journal.jsonl").unlink()
    for event in events:
        if event.get("id") not in ENDS:
            journal.append(copy / "journal.jsonl", event)
    with pytest.raises(PreferenceError, match=r"nothing to mix.*lie outside of what the trained candidates enclose"):
        moalign.open_run(copy).decoder("multi-objective", prefer="helpful")

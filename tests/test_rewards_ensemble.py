"""The reward `ensemble`, on tiny random classifiers, against each of them asked alone."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sweeps import small_config
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from moalign import registry
from moalign.api import Combining, Sample
from moalign.sweeps import run
from moalign.sweeps.observe import Observer
from moalign.testing import check_reward
from moalign_plugins.rewards import _classifiers
from moalign_plugins.rewards.ensemble import Ensemble
from moalign_plugins.rewards.sequence_classification import SequenceClassification

SAMPLES = [Sample("q: ", text) for text in ("a", "some more text", "b c", "", "another one")]


def combined(scores, combine, lam):
    return Combining(combine=combine, lam=lam if combine == "uncertainty" else None).combined(scores)


SCORES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def members(tiny_model_path, tmp_path_factory) -> list[str]:
    """Five of them, each with another head at ``kind``; one more than the model cache once held."""
    folder, found = tmp_path_factory.mktemp("members"), []
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    for number in range(5):
        torch.manual_seed(number)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            id2label={number % 2: "kind", 1 - number % 2: "true"},
            initializer_range=0.3,
        )
        LlamaForSequenceClassification(config).save_pretrained(folder / str(number))
        tokenizer.save_pretrained(folder / str(number))
        found.append(str(folder / str(number)))
    return found


def alone(path: str, **options) -> list[float | None]:
    return SequenceClassification(path=path, head="kind", device="cpu", **options).score(SAMPLES)


def together(paths: list[str], **options) -> list[float | None]:
    return Ensemble(paths=tuple(paths), head="kind", device="cpu", **options).score(SAMPLES)


def test_it_combines_what_the_members_say_alone(members):
    by_sample = list(zip(*(alone(path) for path in members), strict=True))
    assert all(max(row) - min(row) > 1e-2 for row in by_sample)
    assert together(members, combine="mean") == pytest.approx([statistics.fmean(row) for row in by_sample])
    assert together(members) == together(members, combine="mean")
    assert together(members, combine="worst") == pytest.approx([min(row) for row in by_sample])
    expected = [statistics.fmean(row) - 0.5 * statistics.pvariance(row) for row in by_sample]
    assert together(members, combine="uncertainty", lam=0.5) == pytest.approx(expected)
    assert together(members, combine="uncertainty", lam=0.0) == together(members, combine="mean")


@pytest.mark.parametrize("combine", ["mean", "worst", "uncertainty"])
def test_one_member_is_that_member(members, combine):
    assert together(members[:1], combine=combine) == alone(members[0])
    assert together(members[:1] * 3, combine=combine) == pytest.approx(alone(members[0]))


def test_the_order_of_the_members_does_not_matter(members):
    for combine in ("mean", "worst", "uncertainty"):
        assert together(members, combine=combine) == together(members[::-1], combine=combine)


def test_what_one_member_does_not_score_is_not_scored(members):
    scores = together(members, max_length=8)
    assert [score is None for score in scores] == [False, True, False, False, True]
    assert scores == [None if one is None else pytest.approx(one) for one in together(members, max_length=8)]


def test_every_member_is_loaded_once(members):
    _classifiers.classifier_of.cache_clear()
    for _ in range(3):
        together(members)
    assert _classifiers.classifier_of.cache_info().misses == len(members)


@given(SCORES, st.floats(0, 10))
def test_the_rules_are_ordered_and_their_limits_are_the_mean(scores, lam):
    mean, worst = combined(scores, "mean", lam), combined(scores, "worst", lam)
    assert worst <= mean + 1e-9
    assert combined(scores, "uncertainty", lam) <= mean
    assert combined(scores, "uncertainty", 0.0) == mean
    same = combined([scores[0]] * 4, "uncertainty", lam)
    assert same == pytest.approx(scores[0])


@given(SCORES, st.floats(-100, 100))
def test_a_shift_of_all_members_is_a_shift_of_the_score(scores, shift):
    shifted = [score + shift for score in scores]
    for combine in ("mean", "worst", "uncertainty"):
        before, after = (combined(each, combine, 0.3) for each in (scores, shifted))
        assert after - before == pytest.approx(shift, abs=1e-6)


def test_the_variance_has_the_number_of_members_as_divisor():
    assert combined([0.0, 2.0], "uncertainty", 1.0) == 0.0  # with n - 1 it would be -1


def test_it_conforms(members):
    check_reward(Ensemble(paths=tuple(members[:2]), head=1, device="cpu"))


def test_what_it_refuses(members, tmp_path):
    for options, message in (
        ({"paths": ()}, "at least 1"),
        ({"paths": (members[0], str(tmp_path))}, r"no directory with a config\.json"),
        ({"paths": members, "combine": "median"}, "combine"),
        ({"paths": members, "combine": "uncertainty", "lam": -1.0}, "lam"),
        ({"paths": members, "head": 0, "combine": "worst", "lam": 0.5}, "lam has no effect with 'combine: worst'"),
        ({"paths": members, "head": 0, "lam": 0.5}, "lam has no effect with 'combine: mean'"),
    ):
        with pytest.raises(ValidationError, match=message):
            Ensemble.model_validate(options)
    with pytest.raises(ValidationError, match=r"no 'brief' of 0 \(kind\), 1 \(true\), in "):
        Ensemble(paths=tuple(members), head="brief", device="cpu")


def test_a_sweep_can_train_on_it(members, tiny_model_path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"q{number}: "}) + "\n" for number in range(4)))
    choice = {"name": "ensemble", "paths": members[:3], "device": "cpu", "combine": "uncertainty"}
    settings = small_config(
        tiny_model_path,
        prompts,
        objectives={name: {"reward": choice | {"head": name}} for name in ("kind", "true")},
        search={"name": "grid", "points": 2},
        train={"steps": 2, "lr": 1e-2, "together": 1},
        loss="rloo",
        rollouts={"rounds": 1, "samples": 2, "prompts": 2, "prompts_per_step": 1, "max_new_tokens": 5},
    )
    front = run.start(settings, tmp_path / "run", registry.discover(), Observer())
    assert len(front["points"]) == 2 and front["failed"] == []

"""Decoding with a cache gives what transformers' own loop gives, for every architecture whose cache lets it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
from architectures import NOT_SHARING, SHARING, SMALL, TARGETS, small_model
from plain_training import trainable

from moalign import lora
from moalign.engine import decoding, probe
from moalign.engine.decoding import decode
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.rollouts import sample

WINDOW = {"mistral, window of 4": ("mistral", SMALL | {"sliding_window": 4})}
CACHED = {kind: (kind, options) for kind, options in (SHARING | NOT_SHARING).items() if kind != "mamba"} | WINDOW
RWKV = SMALL | {"attention_hidden_size": 32}
PROMPTS = [(1, 20, 21, 22, 23, 24, 25), (1, 30), (1, 40, 41, 42), (1, 30)]
ARGUMENTS = {"samples": 3, "temperature": 3.0, "max_new_tokens": 9, "seed": 3}
SLOTS = [TRAINED, "other", "third"]


@pytest.fixture(scope="module")
def load(tmp_path_factory, tiny_model_path):
    return partial(small_model, tmp_path_factory, tiny_model_path)


@pytest.fixture(autouse=True)
def responses_that_end(monkeypatch):
    """At any of 15 tokens, so that random weights end some of them."""
    monkeypatch.setattr(LanguageModel, "end_ids", property(lambda self: frozenset(range(60, 75))))


def with_slots(model: LanguageModel) -> LanguageModel:
    """Three policies that say different things."""
    lora.add_slots(model.policy, SLOTS)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(model.policy, *SLOTS).values():
        parameter.data.normal_(std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("case", CACHED)
def test_samples_are_those_of_generate(load, case):
    kind, options = CACHED[case]
    model = with_slots(load(kind, options, TARGETS.get(kind, "all-linear" if kind in SHARING else ["q_proj"])))
    assert model.uncached is None
    flattens = kind == "opt"  # rows and positions, in its layers: it takes no adapters of several policies
    adapters = [TRAINED] if flattens or lora.why_not_together(model.policy) else SLOTS
    found = sample(model, adapters, PROMPTS, **ARGUMENTS)
    assert found == sample(replace(model, uncached="for this test"), adapters, PROMPTS, **ARGUMENTS)
    lengths = {len(rollout.ids) for rollouts in found for rollout in rollouts}
    assert len(lengths) > 1 and max(lengths) == ARGUMENTS["max_new_tokens"]
    assert [found[0]] == sample(model, adapters[:1], PROMPTS, **ARGUMENTS)


@pytest.mark.parametrize(
    ("kind", "options", "targets"), [("mamba", NOT_SHARING["mamba"], ["in_proj"]), ("rwkv", RWKV, ["key"])]
)
def test_a_model_whose_cache_does_not_suit_is_sampled_by_generate(load, kind, options, targets):
    """mamba's prompts of different lengths stand behind padding that it does not leave out; rwkv has another cache."""
    model = load(kind, options, targets)
    assert model.uncached and ("change by" in model.uncached if kind == "mamba" else "takes no" in model.uncached)
    (found,) = sample(model, [TRAINED], [PROMPTS[0]], **ARGUMENTS)
    assert len(found) == ARGUMENTS["samples"]


def test_each_prompt_is_computed_once_and_rows_that_ended_leave(load, monkeypatch):
    model = with_slots(load("llama", SMALL))
    forward, shapes = type(model.base).forward, []

    def watched(self, *, input_ids, **arguments):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **arguments)

    watched.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model.base), "forward", watched)
    responses = sample(model, SLOTS, PROMPTS, **ARGUMENTS)
    assert shapes[0] == (3 * 3, 7)  # three adapters, three different prompts
    rows, length = zip(*shapes[1:], strict=True)
    assert set(length) == {1}
    assert list(rows) == sorted(rows, reverse=True) and rows[-1] < rows[0]
    going = [sum(len(each.ids) > step for own in responses for each in own) for step in range(1, len(rows) + 1)]
    assert all(left <= there <= max(left / decoding.KEPT, left) + 1 for left, there in zip(going, rows, strict=True))


def test_nothing_is_computed_once_all_have_ended(load):
    model = load("llama", SMALL)
    asked = []

    def choose(scores, position, rows):
        asked.append(position)
        return torch.full_like(rows, 2 if position == 2 else 7)

    assert decode(model, [None], PROMPTS[:2], choose, 50, {2}) == [[[7, 7, 2, *[0] * 47]] * 2]
    assert asked == [0, 1, 2]


def test_a_cache_that_is_not_the_rows_is_found_out(load, monkeypatch):
    model = load("llama", SMALL)
    assert probe.why_not_cached(model) is None
    wrong = lambda self, rows: self.batch_select_indices(rows.flip(0))  # noqa: E731
    monkeypatch.setattr("transformers.cache_utils.Cache.reorder_cache", wrong)
    assert "change by" in (probe.why_not_cached(model) or "")
    monkeypatch.delattr("transformers.cache_utils.Cache.reorder_cache")
    assert "AttributeError" in (probe.why_not_cached(model) or "")

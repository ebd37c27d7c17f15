"""Responses that share a prompt lie in one row: equal to a row each, found out per model, never silently wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from architectures import NOT_SHARING, SHARING, SMALL, TARGETS, small_model
from plain_training import trainable
from test_layout import random_sequences
from transformers import AutoConfig

from moalign import lora
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine import probe
from moalign.engine.layout import Layout, lay_out, one_by_one, row_length
from moalign.engine.model import TRAINED
from moalign.engine.passes import arrange, pack


@pytest.fixture(scope="module")
def load(tmp_path_factory, tiny_model_path):
    return partial(small_model, tmp_path_factory, tiny_model_path)


@pytest.mark.parametrize("kind", SHARING)
def test_a_shared_row_gives_what_separate_rows_give(load, kind):
    model = load(kind, SHARING[kind])
    assert model.unshared is None
    assert model.packing.shares
    lora.initialise(model.policy, TRAINED, 0)
    for parameter in trainable(model.policy, TRAINED).values():
        torch.nn.init.normal_(parameter, std=0.1)
    sequences = random_sequences(0)
    packing = replace(model.packing, attention=0.0)
    rows = pack(sequences, packing)
    if packing.longest is not None:
        assert all(len(row) == 1 or row_length([sequences[i] for i in row]) <= packing.longest for row in rows)
    assert any(len(row) > 1 for row in rows)
    results = []
    for layout in (one_by_one(sequences, 0), lay_out(sequences, rows, 0), lay_out(sequences, rows, 0, multiple=16)):
        logps = model.response_logps(layout)
        weight = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
        gradients = torch.autograd.grad((logps * weight).sum(), list(trainable(model.policy, TRAINED).values()))
        results.append((logps.detach(), gradients))
    (apart, expected), *others = results
    for together, gradients in others:
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=3e-5)
        for mine, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()) + 1e-6)


@pytest.mark.parametrize("kind", NOT_SHARING)
def test_a_model_that_cannot_share_is_found_out_with_the_reason(load, kind):
    model = load(kind, NOT_SHARING[kind], TARGETS.get(kind, ["q_proj"]))
    print(kind, model.unshared)
    assert model.unshared
    assert not model.packing.shares
    sequences = random_sequences(0)
    assert pack(sequences, model.packing) and all(len(row) == 1 for row in pack(sequences, model.packing))


@pytest.mark.parametrize(("attention", "dtype"), [("eager", "float32"), ("eager", "bfloat16"), ("sdpa", "bfloat16")])
def test_other_attention_and_precision(load, attention, dtype):
    """The probe's tolerance suits the precision: half precision is not taken for a model that cannot share."""
    model = load("llama", SMALL, dtype=dtype)
    model.base.set_attn_implementation(attention)
    assert model.base.config._attn_implementation == attention and model.dtype == getattr(torch, dtype)
    assert probe.why_not_shared(model) is None


def test_what_a_model_raises_is_the_reason(load, monkeypatch):
    model = load("llama", SMALL)
    monkeypatch.setattr(Layout, "attention", lambda self, dtype: torch.zeros(3, 3, 3))
    assert (probe.why_not_shared(model) or "").startswith("it does not take a prepared mask and positions (")


def test_attention_that_ignores_the_mask_is_found_out(load, monkeypatch):
    model = load("llama", SMALL)
    monkeypatch.setattr(Layout, "attention", lambda self, dtype: None)
    assert "change" in (probe.why_not_shared(model) or "")


@pytest.mark.parametrize(
    ("options", "longest"),
    [
        ({"sliding_window": 16}, 16),
        ({"sliding_window": None, "max_window_layers": 28}, None),
        ({"attention_chunk_size": 64, "sliding_window": 32, "chunk_size_feed_forward": 0}, 32),
    ],
)
def test_rows_beyond_a_window_are_not_shared(options, longest):
    config = AutoConfig.for_model("llama", **SMALL, **options)
    assert probe.longest_shared_row(config) == longest


def test_a_pass_with_a_row_beyond_the_window_shares_no_row(load):
    """The mask of a shared row would be the whole pass's, and take the window from the long row."""
    model = load("mistral", SHARING["mistral"])
    units = [[TokenSequence((*range(3, 3 + length), turn, 7, 9), length) for turn in (5, 8)] for length in (12, 40)]
    packing = replace(model.packing, overhead=10**6)  # all in one pass
    (found,) = arrange(units, packing)
    sequences = [sequence for unit in found.units for sequence in units[unit]]
    truth = model.response_logps(one_by_one(sequences, model.pad_id))
    logps = model.response_logps(lay_out(sequences, found.rows, model.pad_id))
    torch.testing.assert_close(logps, truth, rtol=1e-4, atol=1e-4)
    (short,) = arrange(units[:1], packing)
    assert short.rows == [[0, 1]]

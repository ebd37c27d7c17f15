"""Reference log-probabilities: found again by content, never stale, never trusted when damaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_training import trainable

from moalign import lora
from moalign.config import LoraSettings, ModelSettings
from moalign.data.tokenise import Sequence
from moalign.engine import model as models
from moalign.engine import probe
from moalign.engine.layout import lay_out, one_by_one
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.scoring import LogpCache

FIRST = Sequence((1, 10, 11, 12, 13, 14, 15, 2), 3)
SECOND = Sequence((1, 10, 11, 20, 2), 3)
THIRD = Sequence((1, 30, 31, 32, 2), 2)


@pytest.fixture(scope="module")
def model(tiny_model_path) -> LanguageModel:
    return models.load(str(tiny_model_path), ModelSettings(lora=LoraSettings(r=4, alpha=8)), torch.device("cpu"))


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many sequences each forward pass had."""
    calls: list[int] = []
    ask = LanguageModel.response_logps

    def counted(self, layout):
        calls.append(len(layout.counts))
        return ask(self, layout)

    monkeypatch.setattr(LanguageModel, "response_logps", counted)
    return calls


def logps(cache: LogpCache, *sequences: Sequence, adapter: str | None = None, identity: str = "", keep: bool = True):
    return cache.logps(sequences, one_by_one(sequences, 0), adapter, identity, keep=keep)


def test_a_sequence_is_computed_once_and_survives_the_process(model, computed, tmp_path):
    first = LogpCache(model, tmp_path)
    values = logps(first, FIRST, SECOND)
    assert torch.equal(logps(first, FIRST, SECOND), values)
    assert torch.equal(logps(first, SECOND, FIRST), values[[1, 0]])  # in whatever company
    first.save()
    again = LogpCache(model, tmp_path)  # as after a restart
    assert torch.equal(logps(again, SECOND, FIRST), values[[1, 0]])
    assert computed == [2]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_what_is_missing_is_computed_in_the_whole_pass_and_what_is_known_stays(model, computed):
    """So values do not depend on what a killed process left on disk: they are those of the pass as it lies."""
    cache = LogpCache(model)
    known = logps(cache, FIRST)[0]
    whole = logps(LogpCache(model), FIRST, THIRD)
    mixed = logps(cache, FIRST, THIRD)
    assert computed == [1, 2, 2]
    assert torch.equal(mixed[0], known)
    assert torch.equal(mixed[1], whole[1])


def test_the_values_are_those_of_the_first_pass_bitwise(model):
    cache = LogpCache(model)
    layout = lay_out([FIRST, SECOND], [[0, 1]], 0)
    values = cache.logps([FIRST, SECOND], layout, None, "")
    with lora.active(model.policy, None):
        assert torch.equal(values, model.response_logps(layout))
    wider = cache.logps([FIRST, SECOND, THIRD], one_by_one([FIRST, SECOND, THIRD], 0, multiple=32), None, "")
    assert torch.equal(wider[:2], values)


@pytest.mark.parametrize(
    "other",
    [
        Sequence((1, 10, 11, 12, 13, 14, 16, 2), 3),
        Sequence((1, 9, 11, 12, 13, 14, 15, 2), 3),
        Sequence((1, 10, 11, 12, 13, 14, 15, 2), 2),
        Sequence((1, 10, 11, 12, 13, 14, 15), 3),
    ],
)
def test_any_difference_in_content_is_another_key(model, computed, other):
    cache = LogpCache(model)
    logps(cache, FIRST)
    logps(cache, other)
    assert computed == [1, 1]


def test_another_adapter_base_or_number_of_threads_is_another_key(model, computed, tmp_path, monkeypatch):
    cache = LogpCache(model, tmp_path)
    lora.initialise(model.policy, TRAINED, 0)
    with torch.no_grad():
        for parameter in trainable(model.policy, TRAINED).values():
            parameter.add_(0.1)
    base, adapted = logps(cache, FIRST), logps(cache, FIRST, adapter=TRAINED, identity="checksum")
    assert computed == [1, 1]
    assert not torch.equal(base, adapted)
    cache.save()
    logps(LogpCache(replace(model, fingerprint="another"), tmp_path), FIRST)
    assert computed == [1, 1, 1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    logps(LogpCache(model, tmp_path), FIRST)
    assert computed == [1, 1, 1, 1]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other tensors"])
def test_a_damaged_file_is_computed_anew(model, computed, tmp_path, damage):
    from moalign import storage

    cache = LogpCache(model, tmp_path)
    values = logps(cache, FIRST)
    cache.save()
    (file,) = tmp_path.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 8
    if damage == "other tensors":
        storage.write_tensors(file, {"keys": torch.zeros(20, dtype=torch.uint8), "counts": torch.tensor([3])})
    else:
        file.write_bytes({"flipped": bytes(data), "cut": bytes(data[:50]), "empty": b""}[damage])
    again = LogpCache(model, tmp_path)
    assert torch.equal(logps(again, FIRST), values)
    assert computed == [1, 1]
    again.save()
    assert torch.equal(logps(LogpCache(model, tmp_path), FIRST), values)
    assert computed == [1, 1]  # the file is whole again


def test_what_is_not_worth_keeping_is_not_kept(model, computed, tmp_path):
    cache = LogpCache(model, tmp_path)
    logps(cache, FIRST, keep=False)
    logps(cache, FIRST, keep=False)
    cache.save()
    assert computed == [1, 1]
    assert list(tmp_path.iterdir()) == []


def test_what_a_plugin_writes_into_its_batch_does_not_reach_the_cache(model):
    cache = LogpCache(model)
    values = logps(cache, FIRST)
    expected = values.clone()
    values.zero_()
    assert torch.equal(logps(cache, FIRST), expected)


def test_only_response_positions_are_scored(model):
    scored = model.response_logps(one_by_one([FIRST], 0)).detach()
    ids = torch.tensor([FIRST.ids])
    logits = model.policy(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(-1, ids[:, 1:, None])[..., 0]
    assert (scored[:, :2] == 0).all()
    assert torch.allclose(scored[:, 2:], expected[:, 2:], atol=1e-5)


def test_padding_changes_nothing(model):
    """More padding is another batch shape, which may round differently, and no more than that."""
    short, long = (one_by_one([FIRST, SECOND], 0, multiple) for multiple in (1, 32))
    assert long.input_ids.shape[1] == 32
    assert torch.allclose(model.response_logps(short), model.response_logps(long), atol=1e-5)


def test_the_head_may_scale_and_cap_its_logits(model, tiny_model_path):
    """Temperature and soft cap of the configuration are what the model itself would do, or loading refuses."""
    warmer = replace(model, temperature=2.0).response_logps(one_by_one([FIRST], 0)).detach()
    ids = torch.tensor([FIRST.ids])
    logits = model.policy(input_ids=ids).logits[:, :-1] / 2.0
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(warmer[:, 2:], expected[:, 2:], atol=1e-5)
    with pytest.raises(models.ModelError, match="does something that moalign does not know"):
        probe.check_against_own_logits(replace(model, temperature=2.0), str(tiny_model_path))

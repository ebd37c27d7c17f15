"""Reference log-probabilities: found again by content, never stale, never trusted when damaged."""

from __future__ import annotations

import pytest
import torch

from moalign import lora
from moalign.config import LoraSettings, ModelSettings
from moalign.engine import model as models
from moalign.engine.model import TRAINED, LanguageModel
from moalign.engine.scoring import LogpCache


@pytest.fixture(scope="module")
def model(tiny_model_path) -> LanguageModel:
    return models.load(str(tiny_model_path), ModelSettings(lora=LoraSettings(r=4, alpha=8)), torch.device("cpu"))


def rows(last: int = 15) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 10, 11, 12, 13, 14, last, 2]])
    labels = ids[:, 1:].clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.fixture
def computed(model, monkeypatch) -> list[int]:
    """Counts how often the model is asked."""
    calls: list[int] = []
    ask = LanguageModel.response_logps

    def counted(self, batch):
        calls.append(1)
        return ask(self, batch)

    monkeypatch.setattr(LanguageModel, "response_logps", counted)
    return calls


def test_equal_content_is_computed_once_and_survives_the_process(model, computed, tmp_path):
    first = LogpCache(model, tmp_path)
    values = first.logps(rows(), None, "")
    assert torch.equal(first.logps(rows(), None, ""), values)
    again = LogpCache(model, tmp_path)  # as after a restart
    assert torch.equal(again.logps(rows(), None, ""), values)
    assert len(computed) == 1


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "labels"])
def test_any_difference_in_content_is_another_key(model, computed, tmp_path, name):
    cache = LogpCache(model, tmp_path)
    cache.logps(rows(), None, "")
    other = rows()
    other[name] = other[name].clone()
    other[name][0, -1] = 0 if name == "attention_mask" else 5
    cache.logps(other, None, "")
    assert len(computed) == 2


def test_another_adapter_is_another_key(model, computed):
    cache = LogpCache(model)
    lora.initialise(model.policy, TRAINED, 0)
    with torch.no_grad():
        for parameter in lora.trainable(model.policy, TRAINED).values():
            parameter.add_(0.1)
    base, adapted = cache.logps(rows(), None, ""), cache.logps(rows(), TRAINED, "checksum")
    assert len(computed) == 2
    assert not torch.equal(base, adapted)


def test_a_damaged_file_is_computed_anew(model, computed, tmp_path):
    values = LogpCache(model, tmp_path).logps(rows(), None, "")
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[-3] ^= 8
    file.write_bytes(data)
    assert torch.equal(LogpCache(model, tmp_path).logps(rows(), None, ""), values)
    assert len(computed) == 2


def test_what_is_not_worth_keeping_is_not_kept(model, computed, tmp_path):
    cache = LogpCache(model, tmp_path)
    cache.logps(rows(), None, "", keep=False)
    cache.logps(rows(), None, "", keep=False)
    assert len(computed) == 2
    assert list(tmp_path.iterdir()) == []


def test_only_response_positions_are_scored(model):
    scored = model.response_logps(rows()).detach()
    logits = model.policy(input_ids=rows()["input_ids"]).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(-1, rows()["input_ids"][:, 1:, None])[..., 0]
    assert (scored[:, :2] == 0).all()
    assert torch.allclose(scored[:, 2:], expected[:, 2:], atol=1e-5)


def test_padding_changes_nothing(model):
    """More padding is another batch shape, which may round differently, and no more than that."""
    short, long = rows(), rows()
    long["input_ids"] = torch.cat([long["input_ids"], torch.zeros(1, 24, dtype=torch.long)], 1)
    long["attention_mask"] = torch.cat([long["attention_mask"], torch.zeros(1, 24, dtype=torch.long)], 1)
    long["labels"] = torch.cat([long["labels"], torch.full((1, 24), -100)], 1)
    assert torch.allclose(model.response_logps(short), model.response_logps(long)[:, :7], atol=1e-5)


def test_the_head_may_scale_and_cap_its_logits(model, tiny_model_path):
    """Temperature and soft cap of the configuration are what the model itself would do, or loading refuses."""
    from dataclasses import replace

    warmer = replace(model, temperature=2.0).response_logps(rows()).detach()
    logits = model.policy(input_ids=rows()["input_ids"]).logits[:, :-1] / 2.0
    expected = logits.log_softmax(-1).gather(-1, rows()["input_ids"][:, 1:, None])[..., 0]
    assert torch.allclose(warmer[:, 2:], expected[:, 2:], atol=1e-5)
    with pytest.raises(models.ModelError, match="does something that moalign does not know"):
        models._check_against_own_logits(replace(model, temperature=2.0), str(tiny_model_path))

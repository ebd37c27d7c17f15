"""Adapters on the output head: exactly peft's logits and gradients, through the fused log-probabilities."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from plain_training import trainable
from sweeps import small_config, write_pairs
from test_layout import random_sequences
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moalign import lora, registry
from moalign.config import LoraSettings, ModelSettings
from moalign.engine import model as models
from moalign.engine.layout import Layout, one_by_one
from moalign.engine.model import TRAINED, LanguageModel
from moalign.lora import Mixture
from moalign.sweeps import run
from moalign.sweeps.observe import Observer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SEQUENCES = random_sequences(3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_model_path):
    """A model with tied embeddings, or (phi) with a bias in its head."""

    def make(kind: str, **options: Any) -> Path:
        path = Path(shutil.copytree(tiny_model_path, tmp_path_factory.mktemp(kind) / "model"))
        (path / "model.safetensors").unlink()
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=102, pad_token_id=0, **SMALL, **options)
        model = AutoModelForCausalLM.from_config(config)
        nn.init.normal_(model.get_output_embeddings().weight, std=0.2)
        model.save_pretrained(path)
        return path

    return make


@pytest.fixture(params=["llama", "tied", "bias"])
def path(request, directory, tiny_model_path) -> Path:
    if request.param == "llama":
        return tiny_model_path
    return directory("llama", tie_word_embeddings=True) if request.param == "tied" else directory("phi")


def load(path: Path, **changes: Any) -> LanguageModel:
    adapter: dict[str, Any] = {"r": 3, "alpha": 6, "targets": ["q_proj", "lm_head"]} | changes
    settings = ModelSettings(lora=LoraSettings(**adapter))
    model = models.load(str(path), settings, torch.device("cpu"))
    torch.manual_seed(1)
    for parameter in trainable(model.policy, TRAINED).values():
        nn.init.normal_(parameter, std=0.3)
    if getattr(model.head, "bias", None) is not None:
        nn.init.normal_(model.head.bias, std=0.5)
    return model


def own_logps(model: nn.Module, layout: Layout) -> torch.Tensor:
    """From the model's own logits, through its own head."""
    logits = model(input_ids=layout.input_ids, use_cache=False).logits.flatten(0, 1)[layout.source]
    return layout.place(logits.log_softmax(-1).gather(-1, layout.labels[:, None])[:, 0])


def test_log_probabilities_and_gradients_are_those_of_peft(path):
    model = load(path)
    assert isinstance(model.head, LoraLayer)
    layout = one_by_one(SEQUENCES, 0)
    parameters = trainable(model.policy, TRAINED)
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name in parameters if "lm_head" in name}
    ours, theirs = model.response_logps(layout), own_logps(model.policy, layout)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weight = torch.linspace(-1, 1, ours.numel()).view(ours.shape)
    mine = torch.autograd.grad((ours * weight).sum(), list(parameters.values()))
    peft = torch.autograd.grad((theirs * weight).sum(), list(parameters.values()))
    for a, b in zip(mine, peft, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
        assert b.abs().max() > 0


def test_without_the_adapter_it_is_the_base(path):
    model = load(path)
    layout = one_by_one(SEQUENCES, 0)
    adapted = model.response_logps(layout).detach()
    with lora.active(model.policy, None):
        base = model.response_logps(layout)
        torch.testing.assert_close(base, own_logps(model.policy, layout), rtol=1e-5, atol=1e-5)
    assert (adapted - base).abs().max() > 0.1
    assert torch.equal(model.response_logps(layout).detach(), adapted)


def test_dropout_is_on_the_adapters_input_alone(path):
    model = load(path, targets=["lm_head"], dropout=0.5)
    head, hidden = model.head, torch.randn(5, 32)
    assert isinstance(head, LoraLayer)
    without = head(hidden)
    with lora.mixed(model.policy, Mixture((TRAINED,), (5,), (7,))):
        x, weight, bias = lora.adapted_head(head, hidden)
        ours = x @ weight.T if bias is None else x @ weight.T + bias
        torch.testing.assert_close(ours, head(hidden), rtol=1e-5, atol=1e-5)
    assert (ours - without).abs().max() > 1e-2


def test_what_a_sweep_writes_plain_peft_reads(directory, tmp_path):
    """Tied embeddings stay the base's: the adapter sits on the head alone."""
    path = directory("llama", tie_word_embeddings=True)
    targets = {"path": str(path), "lora": {"r": 3, "alpha": 6, "targets": ["v_proj", "lm_head"]}}
    settings = small_config(
        path,
        write_pairs(tmp_path / "pairs.jsonl"),
        model=targets,
        search={"name": "grid", "points": 2},
        train={"steps": 6, "pairs_per_step": 8, "lr": 1e-2},
    )
    run.start(settings, tmp_path / "run", registry.discover(), Observer())
    folder = sorted((tmp_path / "run" / "candidates").iterdir())[0]
    model = models.load(str(path), settings.model, torch.device("cpu"))
    lora.read(model.policy, TRAINED, folder, model.fingerprint)
    layout = one_by_one(SEQUENCES, 0)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        untouched = own_logps(base, layout)
        plain = own_logps(PeftModel.from_pretrained(base, folder), layout)
        ours = model.response_logps(layout)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert (ours - untouched).abs().max() > 1e-3
    assert lora.weights(model.policy, TRAINED)["base_model.model.lm_head.lora_B.weight"].abs().max() > 0

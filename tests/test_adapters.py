"""Adapters on disk: plain peft reads them, and nothing that does not fit is read back."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from plain_training import trainable
from sweeps import small_config, write_pairs
from transformers import AutoModelForCausalLM

from moalign import config, lora, registry, storage
from moalign.config import ModelSettings
from moalign.data.tokenise import Sequence
from moalign.engine import model as models
from moalign.engine.layout import one_by_one
from moalign.engine.model import TRAINED
from moalign.errors import CorruptFileError, ModelError, RunError
from moalign.sweeps import run
from moalign.sweeps.observe import Observer


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_path) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    settings = small_config(tiny_model_path, write_pairs(folder / "pairs.jsonl"), search={"name": "grid", "points": 2})
    run.start(settings, folder / "run", registry.discover(), Observer())
    return folder / "run"


@pytest.fixture
def candidate(finished, tmp_path) -> Path:
    """A copy that a test may damage."""
    source = next(iter(sorted((finished / "candidates").iterdir())))
    return Path(shutil.copytree(source, tmp_path / "candidate"))


@pytest.fixture
def model(finished, tiny_model_path):
    settings = config.Config.model_validate(storage.read_json(finished / "run.json")["config"]).model
    return models.load(str(tiny_model_path), settings, torch.device("cpu"))


IDS = torch.tensor([[1, 10, 11, 12, 13, 14, 15, 2]])
ROWS = one_by_one([Sequence(tuple(IDS[0].tolist()), 3)], pad_id=0)


def test_plain_peft_gives_the_same_token_log_probabilities(candidate, model, tiny_model_path):
    lora.read(model.policy, TRAINED, candidate, model.fingerprint)
    ours = model.response_logps(ROWS).detach()
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32), candidate
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    with torch.no_grad():
        logits = plain(input_ids=IDS).logits[:, :-1]
        untouched = base(input_ids=IDS).logits[:, :-1]
    labels = IDS[:, 1:, None]
    scored = ROWS.mask == 1
    theirs = logits.log_softmax(-1).gather(-1, labels)[..., 0]
    assert torch.allclose(ours[scored], theirs[scored], atol=1e-6)
    base_logps = untouched.log_softmax(-1).gather(-1, labels)[..., 0]
    assert (ours[scored] - base_logps[scored]).abs().max() > 1e-3  # the adapter does something


def test_what_is_written_is_read_back_bitwise(candidate, model):
    lora.read(model.policy, TRAINED, candidate, model.fingerprint)
    stored = storage.read_tensors(candidate / lora.WEIGHTS_FILE)
    now = lora.weights(model.policy, TRAINED)
    assert stored.keys() == now.keys()
    assert all(torch.equal(stored[name], now[name]) for name in stored)
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())


def test_an_adapter_of_another_base_is_refused(candidate, model):
    with pytest.raises(RunError, match="another base model"):
        lora.read(model.policy, TRAINED, candidate, "0" * 64)


def test_missing_tensors_are_not_taken_for_the_base(candidate, model):
    tensors = storage.read_tensors(candidate / lora.WEIGHTS_FILE)
    tensors.pop(sorted(tensors)[3])
    storage.write_tensors(candidate / lora.WEIGHTS_FILE, tensors, {"base": model.fingerprint})
    with pytest.raises(CorruptFileError, match="tensors do not fit the model"):
        lora.read(model.policy, TRAINED, candidate, model.fingerprint)


OTHERS = [("r", 16), ("r", 0), ("peft_type", "IA3"), ("lora_alpha", "99"), ("lora_alpha", -1), ("use_rslora", True)]


@pytest.mark.parametrize(("key", "value"), OTHERS)
def test_another_configuration_is_refused_by_key(candidate, model, key, value):
    content = json.loads((candidate / lora.CONFIG_FILE).read_text()) | {key: value}
    storage.write_json(candidate / lora.CONFIG_FILE, content)
    with pytest.raises(RunError, match=f"{key} is"):
        lora.read(model.policy, TRAINED, candidate, model.fingerprint)


def test_a_configuration_that_is_none_is_named(candidate, model):
    storage.write_json(candidate / lora.CONFIG_FILE, ["LORA"])
    with pytest.raises(CorruptFileError, match=f"{lora.CONFIG_FILE}: not the configuration of an adapter"):
        lora.read(model.policy, TRAINED, candidate, model.fingerprint)


def test_a_flipped_bit_is_found(candidate, model):
    file = candidate / lora.WEIGHTS_FILE
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptFileError, match=str(file)):
        lora.read(model.policy, TRAINED, candidate, model.fingerprint)


def test_a_second_adapter_does_not_change_what_is_trained(candidate, model):
    policy = model.policy
    before = trainable(policy, TRAINED)
    policy.add_adapter("frozen0", policy.peft_config[TRAINED])
    lora.read(policy, "frozen0", candidate, model.fingerprint)
    with lora.active(policy, "frozen0"):
        frozen = model.response_logps(ROWS)
    with lora.active(policy, None):
        base = model.response_logps(ROWS)
    assert not torch.equal(frozen, base)
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == set(before)
    assert policy.active_adapter == TRAINED


@pytest.mark.parametrize("adapter", [TRAINED, "other", None])
def test_switching_computes_what_pefts_own_switch_does_and_leaves_nothing_behind(model, adapter):
    policy = model.policy
    policy.add_adapter("other", policy.peft_config[TRAINED])
    for seed, slot in enumerate((TRAINED, "other")):
        lora.initialise(policy, slot, seed)
        with torch.no_grad():
            for parameter in lora.parameters(policy, slot):
                parameter.add_(0.01)
    own = model.response_logps(ROWS).detach()
    gradients = [parameter.requires_grad for parameter in policy.parameters()]
    with lora.active(policy, "other"):  # from one into another, and back
        outer = model.response_logps(ROWS)
        with lora.active(policy, adapter):
            found = model.response_logps(ROWS)
        assert torch.equal(model.response_logps(ROWS), outer)
    assert torch.equal(model.response_logps(ROWS), own) and not torch.equal(outer, own)
    assert [parameter.requires_grad for parameter in policy.parameters()] == gradients
    if adapter is None:
        with policy.disable_adapter():
            expected = model.response_logps(ROWS)
    else:
        policy.set_adapter(adapter)
        expected = model.response_logps(ROWS)
    assert torch.equal(found, expected.detach())


def test_targets_that_cannot_work_are_refused(tiny_model_path):
    with pytest.raises(ModelError, match=r"model\.lora\.targets: .*nowhere"):
        models.load(str(tiny_model_path), ModelSettings(lora={"targets": ["nowhere"]}), torch.device("cpu"))


def test_a_regular_expression_and_rslora_work(tiny_model_path):
    settings = ModelSettings(lora={"targets": r".*\.(q|v)_proj", "rslora": True, "r": 4, "alpha": 8})
    model = models.load(str(tiny_model_path), settings, torch.device("cpu"))
    assert len(trainable(model.policy, TRAINED)) == 2 * 2 * 2  # layers x modules x (A, B)
    assert {layer.scaling[TRAINED] for layer in lora.layers(model.policy)} == {8 / 4**0.5}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("on", [True, False])
def test_adapted_layers_compute_what_peft_computes(tiny_model_path, dropout, on):
    """Values and all gradients, the input's among them; in training with dropout it is peft's own forward."""
    model = models.load(
        str(tiny_model_path), ModelSettings(lora={"r": 3, "alpha": 7, "dropout": dropout}), torch.device("cpu")
    )
    for parameter in trainable(model.policy, TRAINED).values():
        torch.nn.init.normal_(parameter, std=0.3)
    layer = model.base.model.layers[0].mlp.down_proj
    layer.train(dropout > 0)
    layer.enable_adapters(on)
    wanted = [layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight] if on else []
    results = []
    for forward in (layer.forward, partial(LoraLinear.forward, layer)):
        torch.manual_seed(0)
        x = torch.randn(2, 5, 64, requires_grad=True)
        torch.manual_seed(1)
        y = forward(x)
        results.append(
            (y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), [x, *wanted]))
        )
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)

"""Adapters in ordinary models and merged into them: against sums by hand, for every kind of layer that takes one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moalign.errors import CorruptFileError, ModelError, RunError
from moalign.lora import mixing, ordinary
from moalign.lora.mixing import Adapter

IDS = torch.arange(3, 23)[None]
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},  # Conv1D: its weights are [in, out]
}


def model_of(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = KINDS[kind] | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **options)).eval()


def adapter_for(model: Any, targets: list[str] | str, **options: Any) -> Adapter:
    """A random one, with its configuration as peft would write it."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", **options)
    own = get_peft_model(model, config)
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {
        name: 0.2 * torch.randn_like(tensor, dtype=torch.float32)
        for name, tensor in get_peft_model_state_dict(own, save_embedding_layers=False).items()
    }
    written = {key: sorted(v) if isinstance(v, set) else v for key, v in own.peft_config["default"].to_dict().items()}
    return Adapter("mine", tensors, 3, 5.0, bool(options.get("use_rslora")), "base", written)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


CASES = [
    ("llama", "all-linear", {}),
    ("llama", ["q_proj", "down_proj"], {"use_rslora": True, "layers_to_transform": [1]}),
    ("llama", ["lm_head", "v_proj"], {}),
    ("llama", ["embed_tokens", "q_proj", "lm_head"], {}),
    ("gpt2", ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("kind", "targets", "options"), CASES)
@pytest.mark.parametrize("tied", [True, False])
def test_merged_and_attached_are_the_same_function(kind, targets, options, tied):
    """In float64, where only the order of the sums differs."""
    adapter = adapter_for(model_of(kind, tie_word_embeddings=tied), targets, **options)

    def base():
        return model_of(kind, tie_word_embeddings=tied).double()

    attached = ordinary.attach(base(), adapter).double()
    expected = logits(attached)
    assert not torch.allclose(expected, logits(base()), atol=1e-2)
    merged = ordinary.merge(ordinary.attach(base(), adapter))
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-12)
    assert merged.config.tie_word_embeddings == (tied and "lm_head" not in targets)
    head, embedding = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    assert (head is embedding) == merged.config.tie_word_embeddings
    assert torch.equal(embedding, base().get_input_embeddings().weight) == ("embed_tokens" not in targets)


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_is_written_and_read_back_with_its_ties(tmp_path, tied):
    for targets in (["lm_head"], ["q_proj"]):
        base = model_of("llama", tie_word_embeddings=tied)
        adapter = adapter_for(model_of("llama", tie_word_embeddings=tied), targets)
        merged = ordinary.merge(ordinary.attach(base, adapter))
        merged.save_pretrained(tmp_path / targets[0])
        again = AutoModelForCausalLM.from_pretrained(tmp_path / targets[0])
        assert torch.equal(logits(again), logits(merged))
        same = again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert same == (tied and targets == ["q_proj"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    base = model_of("llama").to(dtype)
    adapter = adapter_for(model_of("llama"), ["up_proj"])
    before = base.model.layers[0].mlp.up_proj.weight.detach().clone()
    merged = ordinary.merge(ordinary.attach(base, adapter))
    name = "base_model.model.model.layers.0.mlp.up_proj"
    a, b = adapter.tensors[f"{name}.lora_A.weight"], adapter.tensors[f"{name}.lora_B.weight"]
    exact = before.double() + adapter.scaling * (b.double() @ a.double())
    weight = merged.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == dtype and torch.equal(weight, exact.to(dtype))
    assert merged.model.layers[0].mlp.down_proj.weight.dtype == dtype


def test_what_does_not_fit_is_refused():
    adapter = adapter_for(model_of("llama"), ["q_proj"])
    name = next(iter(adapter.tensors))
    for tensors, config, error in (
        ({**adapter.tensors, name: torch.zeros(3, 31)}, {}, CorruptFileError),
        ({key: value for key, value in adapter.tensors.items() if key != name}, {}, CorruptFileError),
        (adapter.tensors, {"target_modules": ["q_proj", "k_proj"]}, CorruptFileError),
        (adapter.tensors, {"target_modules": ["nowhere"]}, ModelError),
        (adapter.tensors, {"target_modules": {"q_proj": 1}}, CorruptFileError),
    ):
        changed = Adapter("mine", tensors, 3, 5.0, False, "base", {**adapter.config, **config})
        with pytest.raises(error, match="mine"):
            ordinary.attach(model_of("llama"), changed)


def test_layers_that_share_their_weights_are_not_merged():
    base = model_of("llama")
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    attached = ordinary.attach(base, adapter_for(model_of("llama"), ["up_proj"]))
    with pytest.raises(ModelError, match="shares its weights with another layer"):
        ordinary.merge(attached)


def test_an_adapted_embedding_that_is_the_head_too_is_not_merged():
    attached = ordinary.attach(
        model_of("llama", tie_word_embeddings=True), adapter_for(model_of("llama"), ["embed_tokens"])
    )
    with pytest.raises(ModelError, match="embed_tokens: shares its weights"):
        ordinary.merge(attached)


def test_adapters_of_gpt2_and_of_embeddings_are_read(tmp_path):
    gpt2 = adapter_for(model_of("gpt2"), ["c_attn"], fan_in_fan_out=True)
    mixing.write(gpt2, tmp_path / "gpt2")
    again = mixing.read(tmp_path / "gpt2")
    assert torch.equal(
        logits(ordinary.attach(model_of("gpt2"), again)), logits(ordinary.attach(model_of("gpt2"), gpt2))
    )
    for targets in (["embed_tokens"], ["embed_tokens", "q_proj"]):
        adapter = adapter_for(model_of("llama"), targets)
        folder = tmp_path / "-".join(targets)
        mixing.write(adapter, folder)
        with pytest.raises(RunError, match="lora_embedding_A adapts an embedding"):
            mixing.read(folder)
        again = mixing.read(folder, alone=True)
        expected = logits(ordinary.attach(model_of("llama"), adapter))
        assert torch.equal(logits(ordinary.attach(model_of("llama"), again)), expected)


def test_quantised_weights_are_not_merged():
    attached = ordinary.attach(model_of("llama"), adapter_for(model_of("llama"), ["up_proj"]))
    layer = attached.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"int8 take up no adapter"):
        ordinary.merge(attached)

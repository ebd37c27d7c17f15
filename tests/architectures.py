"""Small models of many architectures, with random weights: what is found out about each, and what it samples."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moalign.config import LoraSettings, ModelSettings
from moalign.engine import model as models
from moalign.engine.model import LanguageModel

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 102,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 102}
SHARING: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 8},
    "gemma2": SMALL | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "gemma3_text": SMALL | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "mistral": SMALL | {"sliding_window": 24},
    "gpt2": GPT,
    "gpt_neox": SMALL,
    "opt": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "olmoe": SMALL | {"num_experts": 4, "num_experts_per_tok": 2},
}
NOT_SHARING: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 102},
    "mamba": SMALL | {"state_size": 4},
    "falcon_h1": SMALL | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "qwen3_next": SMALL | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                           "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                           "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip

TARGETS = {"mamba": ["in_proj"], "bloom": ["query_key_value"]}


def small_model(
    folders: pytest.TempPathFactory,
    tiny_model_path: Path,
    kind: str,
    options: dict[str, Any],
    targets: Any = "all-linear",
    dtype: Any = "float32",
    layers: Any = "all",
) -> LanguageModel:
    """With the tokenizer of the tiny model."""
    path = Path(shutil.copytree(tiny_model_path, folders.mktemp(kind) / "model"))
    (path / "model.safetensors").unlink()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that what a token sees matters
    model.save_pretrained(path)
    settings = ModelSettings(dtype=dtype, lora=LoraSettings(r=2, alpha=4, targets=targets, layers=layers))
    return models.load(str(path), settings, torch.device("cpu"))

"""Load a base model and its tokenizer once, and know how its hidden states become token log-probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from moalign import lora
from moalign.config import ModelSettings
from moalign.data.tokenise import Tokeniser, check_vocabulary
from moalign.errors import ModelError
from moalign.ops import token_logps

TRAINED = "candidate"  # the adapter slot that is trained; further slots hold frozen adapters


@dataclass(frozen=True)
class LanguageModel:
    """A frozen base with adapter slots.

    ``fingerprint`` is a sha256 over the base's weights, ``tokenizer_fingerprint`` over the tokenizer's files' content.
    """

    policy: PeftModel
    tokeniser: Tokeniser
    device: torch.device
    temperature: float
    softcap: float | None
    fingerprint: str
    tokenizer_fingerprint: str

    @property
    def base(self) -> Any:
        """The transformers model inside, with the adapters' layers in it."""
        return self.policy.get_base_model()

    @property
    def head(self) -> nn.Linear:
        return self.base.get_output_embeddings()

    @property
    def pad_id(self) -> int:
        return self.tokeniser.pad_id

    @property
    def end_ids(self) -> frozenset[int]:
        """A sampled response ends at the first of these."""
        return frozenset(self.tokeniser.stop_ids)

    def response_logps(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Log-probability of every response token under the active adapter; float32 [N, L-1], 0 elsewhere.

        ``rows`` holds input_ids [N,L], attention_mask [N,L] and labels [N,L-1] (-100 where nothing is scored). Only
        scored positions meet the output head.
        """
        hidden = self.base.base_model(
            input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False
        ).last_hidden_state[:, :-1]
        labels = rows["labels"]
        scored = labels != -100
        head = self.head
        logps = token_logps(
            hidden[scored],
            head.weight,
            labels[scored],
            getattr(head, "bias", None),
            temperature=self.temperature,
            softcap=self.softcap,
        ).logps
        return torch.zeros(labels.shape, dtype=torch.float32, device=labels.device).masked_scatter(scored, logps)


def load(path: str, settings: ModelSettings, device: torch.device) -> LanguageModel:
    """Base and tokenizer from a directory (or the hub's cache), safetensors only, never remote code.

    Raises ModelError naming the directory and what is wrong with it.
    """
    transformers_logging.disable_progress_bar()
    base = _load_base(path, settings, device)
    tokenizer = load_tokenizer(path)
    head = base.get_output_embeddings()
    if head is None:
        raise ModelError(f"{path}: the model has no output head, so it is no causal language model")
    check_vocabulary(tokenizer, head.weight.shape[0])
    base.requires_grad_(False)
    base.generation_config = GenerationConfig()  # its penalties and limits would seep into samples of the policy
    fingerprint = base_fingerprint(base)
    adapter = settings.lora
    config = lora.configuration(adapter.r, adapter.alpha, adapter.targets, adapter.dropout, adapter.rslora, path)
    policy = lora.inject(base, config, TRAINED)
    policy.eval()
    text_config = base.config.get_text_config()
    scale = getattr(text_config, "logit_scale", None) or 1.0 / (getattr(text_config, "logits_scaling", None) or 1.0)
    model = LanguageModel(
        policy=policy,
        tokeniser=Tokeniser.of(tokenizer),
        device=device,
        temperature=1.0 / scale,
        softcap=getattr(text_config, "final_logit_softcapping", None),
        fingerprint=fingerprint,
        tokenizer_fingerprint=_tokenizer_fingerprint(tokenizer),
    )
    _check_against_own_logits(model, path)
    return model


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model directory. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{path}: the tokenizer cannot be loaded: {error}") from None


def _load_base(path: str, settings: ModelSettings, device: torch.device) -> Any:
    directory = Path(path)
    if directory.is_dir() and not (directory / "config.json").exists():
        raise ModelError(f"{path}: no config.json in it; this is not a model in the transformers format")
    if settings.dtype == "auto":
        dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    else:
        dtype = getattr(torch, settings.dtype)
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"{path}: the model cannot be loaded: {error}") from None
    return base.to(device)


def base_fingerprint(base: nn.Module) -> str:
    """sha256 over names, types and bytes of all base weights; adapters are left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        if "lora_" in name:
            continue
        digest.update(f"{name.replace('.base_layer', '')}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    content = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{content}/{tokenizer.chat_template}".encode()).hexdigest()


@torch.no_grad()
def _check_against_own_logits(model: LanguageModel, path: str) -> None:
    """The model's own forward pass must agree with ours; else it scales or caps its logits in a way we do not know."""
    vocabulary = model.head.weight.shape[0]
    ids = (torch.arange(8, device=model.device) * 7 % vocabulary)[None]
    labels = ids[:, 1:]
    ours = model.response_logps({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    logits = model.policy(input_ids=ids, use_cache=False).logits[:, :-1].float()
    theirs = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    tolerance = 1e-3 if model.head.weight.dtype == torch.float32 else 0.1
    if not torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance):
        raise ModelError(
            f"{path}: log-probabilities from hidden states differ from the model's own logits by up to "
            f"{(ours - theirs).abs().max():.3g}; its output head does something that moalign does not know"
        )

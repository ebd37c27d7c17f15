"""Load a base model and its tokenizer once, and know how its hidden states become token log-probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from moalign import lora
from moalign.config import ModelSettings
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.data.tokenise import Tokeniser, check_vocabulary
from moalign.engine import layout as layouts
from moalign.engine import lower, probe
from moalign.engine.layout import Layout
from moalign.engine.lower import Copies
from moalign.engine.passes import OPERATIONS_PER_SECOND, Packing
from moalign.errors import ModelError
from moalign.ops import TokenLogps, distributions, frozen_linear, token_logps

TRAINED = "candidate"  # the adapter slot that is trained; further slots hold frozen adapters
CPU_MEMORY = 4 * 2**30  # bytes that the activations of one pass may take
BYTES_PER_ACTIVATION = 48  # of a 16-bit number per layer and unit of width, all that backward needs counted


@dataclass(frozen=True)
class LanguageModel:
    """A frozen base with adapter slots.

    ``fingerprint`` is a sha256 over the base's weights, ``tokenizer_fingerprint`` over the tokenizer's files' content.
    ``packing`` says how sequences are best arranged into passes; ``unshared`` why responses to one prompt cannot lie
    in one row (None: they can), ``uncached`` why they cannot go on from one computation of it when they are sampled.
    ``upper``: the layers from the first one with an adapter on, where those below run
    once for all candidates. ``lower``: those below, where they need not run for rows whose hidden states are known;
    ``unskipped`` why there are none.
    """

    policy: PeftModel
    tokeniser: Tokeniser
    device: torch.device
    temperature: float
    softcap: float | None
    fingerprint: str
    tokenizer_fingerprint: str
    packing: Packing
    unshared: str | None = None
    uncached: str | None = None
    upper: tuple[nn.Module, ...] = ()
    lower: tuple[nn.Module, ...] = ()
    unskipped: str | None = None

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

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def width(self) -> int:
        """Of a hidden state."""
        return self.head.weight.shape[1]

    @property
    def adapter_dropout(self) -> bool:
        """Whether the adapters drop inputs in training."""
        return any(getattr(config, "lora_dropout", 0.0) for config in self.policy.peft_config.values())

    def lay_out(self, sequences: Sequence[TokenSequence], rows: Sequence[Sequence[int]]) -> Layout:
        """``layout.lay_out`` with this model's padding, on its device."""
        packing = self.packing
        return layouts.lay_out(sequences, rows, self.pad_id, packing.multiple, packing.whole).to(self.device)

    def response_logps(self, layout: Layout, copies: Copies | None = None) -> Tensor:
        """Log-probability of every response token under the active adapter; float32 [N,T], 0 elsewhere."""
        return self.scores_of(self.response_states(layout, copies), layout).logps

    def response_states(self, layout: Layout, copies: Copies | None = None) -> Tensor:
        """The last hidden states that predict a response token, [S,D]; no others meet the output head."""
        return self.hidden_states(layout, copies).index_select(0, layout.source)

    def hidden_states(self, layout: Layout, copies: Copies | None = None) -> Tensor:
        """The last hidden state of every position, [B L,D].

        ``copies``: rows that ``lower.copied`` makes behind the layers that compute the same for all of a kind.
        """
        once: Any = slice(None) if copies is None else copies.first
        arguments: dict[str, Tensor | None] = {}
        if layout.segments is not None and layout.position_ids is not None:
            mask = replace(layout, segments=layout.segments[once]).attention(self.dtype)
            arguments = {"attention_mask": mask, "position_ids": layout.position_ids[once]}
        # without a mask attention is causal, and padding on the right is seen by nobody
        output = self.base.base_model(input_ids=layout.input_ids[once], use_cache=False, **arguments)
        return output.last_hidden_state.flatten(0, 1)

    def scores_of(self, states: Tensor, layout: Layout, *, entropy: bool = False) -> TokenLogps:
        """What the output head makes of ``response_states``: see ``response_logps``; all [N,T].

        ``entropy``: with the entropy of the choice at each response token, and its gradient.
        """
        hidden, weight, bias = lora.adapted_head(self.head, states)
        how: Any = {"temperature": self.temperature, "softcap": self.softcap, "entropy_gradient": entropy}
        scored = token_logps(hidden, weight, layout.labels, bias, **how)
        placed = None if scored.entropy is None else layout.place(scored.entropy)
        return TokenLogps(layout.place(scored.logps), placed)

    def distributions(self, states: Tensor) -> Tensor:
        """Log-probabilities of the whole vocabulary, float32 [S,V], of ``response_states``."""
        hidden, weight, bias = lora.adapted_head(self.head, states)
        return distributions(hidden, weight, bias, temperature=self.temperature, softcap=self.softcap)

    def checkpoint(self, on: bool) -> None:
        """Whether activations are computed again in backward instead of kept; the output head is no part of it."""
        base, action = self.base, "enable" if on else "disable"
        if not on and not any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
            return
        # renamed in transformers 5
        switch = getattr(base, f"activation_checkpointing_{action}", None) or getattr(
            base, f"gradient_checkpointing_{action}"
        )
        switch(*[{"use_reentrant": False}] if on else [])
        # transformers asks for the embeddings' gradients, which only reentrant checkpointing needs: frozen layers below
        # the first adapter would keep their activations, and be run backwards
        base.disable_input_require_grads()

    @contextmanager
    def checkpointing(self, on: bool) -> Iterator[None]:
        """transformers checkpoints activations only in training mode; the modules inside stay in evaluation mode."""
        switched = [
            module for module in self.policy.modules() if on and getattr(module, "gradient_checkpointing", False)
        ]
        for module in switched:
            module.training = True
        try:
            yield
        finally:
            for module in switched:
                module.training = False


def load(path: str, settings: ModelSettings, device: torch.device) -> LanguageModel:
    """Base and tokenizer from a directory (or the hub's cache), safetensors only, never remote code.

    Raises ModelError naming the directory and what is wrong with it.
    """
    quiet()
    base = load_base(path, settings.dtype, device)
    tokenizer = load_tokenizer(path)
    head = base.get_output_embeddings()
    if head is None:
        raise ModelError(f"{path}: the model has no output head, so it is no causal language model")
    check_vocabulary(tokenizer, head.weight.shape[0])
    base.requires_grad_(False)
    base.generation_config = GenerationConfig()  # its penalties and limits would seep into samples of the policy
    fingerprint = base_fingerprint(base)
    frozen_linear.speed_up(base)
    adapter = settings.lora
    targets, layers = lora.upper_layers(base, adapter.layers, adapter.targets)
    config = lora.configuration(adapter.r, adapter.alpha, targets, adapter.dropout, adapter.rslora, path, layers)
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
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        packing=_packing(text_config, device, base),
    )
    probe.check_against_own_logits(model, path)
    reason = probe.why_not_shared(model)
    longest = probe.longest_shared_row(text_config)
    model = replace(
        model,
        unshared=reason,
        uncached=probe.why_not_cached(model),
        packing=replace(model.packing, shares=reason is None, longest=longest),
    )
    below, upper = lower.split(base)
    if not upper:
        return replace(model, unskipped="no layer lies below all adapters")
    if not probe.copies_agree(model, upper):
        return replace(model, unskipped="rows cannot be copied behind its lower layers")
    skipping = replace(model, upper=upper, lower=below)
    reason = probe.why_not_skipped(skipping)
    return skipping if reason is None else replace(model, upper=upper, unskipped=reason)


def quiet() -> None:
    """No progress bars of transformers: whoever loads a model says so in a line of its own."""
    transformers_logging.disable_progress_bar()


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model directory. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{path}: the tokenizer cannot be loaded: {error}") from None


def load_base(path: str, dtype: str, device: torch.device) -> Any:
    """The transformers model of a directory, or of the hub's cache: safetensors only, never remote code.

    ``dtype`` as in the configuration; "stored": as the directory has it, wherever it is loaded. Raises ModelError.
    """
    directory = Path(path)
    if directory.is_dir() and not (directory / "config.json").exists():
        raise ModelError(f"{path}: no config.json in it; this is not a model in the transformers format")
    if dtype in ("auto", "stored"):
        kind: Any = torch.float32 if device.type == "cpu" and dtype == "auto" else "auto"
    else:
        kind = getattr(torch, dtype)
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=kind, trust_remote_code=False, use_safetensors=True
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


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over what a tokenizer does with text, and its chat template."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    content = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{content}/{tokenizer.chat_template}".encode()).hexdigest()


def _packing(config: Any, device: torch.device, base: Any) -> Packing:
    """Costs of this model on this device, by rule of thumb: they decide how fast a step is, not what it computes.

    A layer takes so many seconds however few positions it sees, and so many operations a second where there are many.
    The limit is a rough count of what activations take of the memory.
    """
    on_gpu = device.type == "cuda"
    head = base.get_output_embeddings().weight
    width, layers = head.shape[1], getattr(config, "num_hidden_layers", 1)
    memory = CPU_MEMORY
    if on_gpu:
        weights = sum({parameter.data_ptr(): parameter.nbytes for parameter in base.parameters()}.values())
        memory = max(0, torch.cuda.get_device_properties(device).total_memory - weights) // 2
    layer_seconds, speed = 1e-3 if on_gpu else 2.5e-3, OPERATIONS_PER_SECOND[on_gpu]
    return Packing(
        attention=(1 if on_gpu else 2) / (6 * width),  # on a CPU it runs at about half the speed of products
        overhead=layer_seconds * speed / (3 * 24 * width**2),  # 3: backward takes twice as long as forward
        limit=max(1024, memory // (BYTES_PER_ACTIVATION * layers * width * head.itemsize // 2)),
        multiple=8 if on_gpu else 1,
    )

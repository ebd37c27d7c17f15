"""The reward that an adapter trained on preferences stands for: its log-ratio to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from moalign.api import DataError, ModelError, Reward, Sample
from moalign_plugins.rewards._models import LOCAL, Dtype, device_and_dtype, model_directory, most_tokens

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "implicit-reward",
    "class": "ImplicitReward",
    "summary": "beta times the log-ratio of an adapter to its base, such as a candidate of an earlier sweep",
    "paper": "arXiv:2305.18290",
}
Ids = tuple[list[int], int]  # of prompt and response, and how many of them are the prompt's


class ImplicitReward(Reward):
    """beta * (log pi(y|x) - log pi_base(y|x)), summed over the tokens of the response and the one that ends it.

    Safetensors only, no remote code, nothing is downloaded. Abstains where prompt and response are longer than the
    model takes. A conversation goes through the tokenizer's chat template.
    """

    deterministic: ClassVar[bool] = False  # the last bits depend on who shares a padded batch

    adapter: str
    """a directory in peft's format, such as runs/first/candidates/only-helpful"""
    base: str
    """the directory of the model that the adapter was trained on, with its tokenizer"""
    beta: float = Field(default=0.1, gt=0)
    """as the adapter was trained with, where its scale matters"""
    batch_size: int = Field(default=8, ge=1)
    device: str = "auto"
    """auto: an accelerator where there is one, else the CPU"""
    dtype: Dtype = "auto"
    """of the base; auto: as stored on an accelerator, float32 on a CPU"""

    @field_validator("base")
    @classmethod
    def _is_a_model(cls, path: str) -> str:
        return model_directory(path)

    @field_validator("adapter")
    @classmethod
    def _is_an_adapter(cls, path: str) -> str:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (Path(path).expanduser() / name).is_file():
                raise ValueError(f"no directory with an {name}: {path}")
        return path

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        paths = [str(Path(path).expanduser()) for path in (self.adapter, self.base)]
        policy = _policy(*paths, self.device, self.dtype)
        encoded = [policy.encoded(sample) for sample in samples]
        found: list[float | None] = [None] * len(samples)
        fitting = [index for index, (ids, _) in enumerate(encoded) if len(ids) <= policy.most]
        fitting.sort(key=lambda index: len(encoded[index][0]))
        for start in range(0, len(fitting), self.batch_size):
            batch = fitting[start : start + self.batch_size]
            for index, ratio in zip(batch, policy.log_ratios([encoded[index] for index in batch]), strict=True):
                found[index] = self.beta * ratio
        return found


@lru_cache(maxsize=2)
def _policy(adapter: str, base: str, device: str, dtype: str) -> _Policy:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, dtype = device_and_dtype(device, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **LOCAL)
        model = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, dtype=dtype, **LOCAL)
        policy: Any = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{adapter}: cannot be read as an adapter of {base}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{base}: its tokenizer has no token that ends a response")
    return _Policy(tokenizer, policy.eval().requires_grad_(False).to(place), most_tokens(tokenizer, model.config))


@dataclass(frozen=True)
class _Policy:
    """A tokenizer, a base with its adapter, and how many tokens they take."""

    tokenizer: Any
    model: Any
    most: int

    def encoded(self, sample: Sample) -> Ids:
        """Ids are joined, never texts, as in training; the end token closes the response."""
        from jinja2 import TemplateError

        tokenizer, bos = self.tokenizer, self.tokenizer.bos_token_id
        if isinstance(sample.prompt, str):
            prompt = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
            prompt = prompt if bos is None else [bos, *prompt]
        else:
            said = [dict(message) for message in sample.prompt]
            try:
                text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
            except (TemplateError, ValueError) as error:
                raise DataError(f"the base's chat template does not take this conversation: {error}") from None
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        response = tokenizer(sample.response, add_special_tokens=False)["input_ids"]
        return [*(prompt or [tokenizer.eos_token_id]), *response, tokenizer.eos_token_id], len(prompt) or 1

    def log_ratios(self, rows: Sequence[Ids]) -> list[float]:
        """log pi - log pi_base of the responses, summed over their tokens."""
        import torch

        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row, _ in rows], device=self.model.device)
        places = torch.arange(width, device=ids.device)
        lengths = torch.tensor([len(row) for row, _ in rows], device=ids.device)[:, None]
        prompts = torch.tensor([prompt for _, prompt in rows], device=ids.device)[:, None]
        attention, counts = (places < lengths).long(), (places >= prompts) & (places < lengths)
        with torch.no_grad():
            own = self._logps(ids, attention)
            with self.model.disable_adapter():
                base = self._logps(ids, attention)
        ratios: list[float] = ((own - base) * counts[:, 1:]).sum(1).tolist()
        return ratios

    def _logps(self, ids: Tensor, attention: Tensor) -> Tensor:
        """float64 [N,T-1], of each token but the first."""
        logits = self.model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
        return (logits.gather(2, ids[:, 1:, None]).squeeze(2) - logits.logsumexp(2)).double()

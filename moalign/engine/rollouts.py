"""Responses sampled from the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig

from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.model import LanguageModel


@dataclass(frozen=True)
class Rollout:
    """One sampled response: its token ids (the end token included where it was produced) and its text."""

    prompt: int
    ids: tuple[int, ...]
    text: str
    ended: bool


Score = Callable[[Sequence[Rollout]], np.ndarray]  # -> rewards [N, M], larger is better, NaN where a reward abstains


@torch.no_grad()
def sample(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    rows_per_pass: int = 256,
) -> list[Rollout]:
    """``samples`` responses per prompt (token ids) from the policy with the adapter that is active.

    Plain sampling at ``temperature``: no top-k, no top-p, no penalties, whatever the model's own generation settings
    say, because everything here is an estimate under the policy itself. A function of ``seed``; the global generator
    is left as it was.
    """
    tokeniser, device = model.tokeniser, model.device
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(model.end_ids),
        pad_token_id=model.pad_id,
        bos_token_id=tokeniser.bos_id,
    )
    rollouts: list[Rollout] = []
    order = [index for index in range(len(prompts)) for _ in range(samples)]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(order), rows_per_pass):
            chunk = order[start : start + rows_per_pass]
            width = max(len(prompts[index]) for index in chunk)
            ids = torch.full((len(chunk), width), model.pad_id, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chunk):
                prompt = prompts[index]
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            output = model.policy.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
            for index, response in zip(chunk, output[:, width:].tolist(), strict=True):
                rollouts.append(_rollout(index, response, model))
    return rollouts


def _rollout(prompt: int, response: list[int], model: LanguageModel) -> Rollout:
    end = next((position for position, token in enumerate(response) if token in model.end_ids), None)
    ids = tuple(response if end is None else response[: end + 1])
    text = model.tokeniser.tokenizer.decode(ids, skip_special_tokens=True)
    return Rollout(prompt, ids, text, end is not None)


def sequence_of(rollout: Rollout, prompts: Sequence[tuple[int, ...]]) -> TokenSequence:
    """The rollout after its prompt, as sampled: its own ids, never its text tokenised again."""
    prompt = prompts[rollout.prompt]
    return TokenSequence(prompt + rollout.ids, len(prompt), truncated=not rollout.ended)

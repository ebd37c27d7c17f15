"""Responses sampled from policies; rows of several candidates stand in one batch, as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from moalign import lora
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.model import LanguageModel
from moalign.engine.rewards import Scored
from moalign.errors import TrainingError
from moalign.lora import Mixture
from moalign.seeds import derive

ROWS = 256  # of one policy in a call; they share a draw of noise
ROWS_IN_ALL = 1024  # of all policies in a call, if one has not more
LEAST_NOISE = 2.0**-25  # half the step of the generator, which may return 0


@dataclass(frozen=True)
class Rollout:
    """One sampled response: its token ids (the end token included where it was produced) and its text."""

    prompt: int
    ids: tuple[int, ...]
    text: str
    ended: bool


Score = Callable[[Sequence[Rollout]], Scored]


def prompts_of_round(available: int, wanted: int, seed: int, number: int) -> list[int]:
    """Which prompts are asked in round ``number``, in order; all of them where no more are there than wanted."""
    rng = np.random.default_rng(derive(seed, "prompts", number))
    return sorted(rng.choice(available, size=min(wanted, available), replace=False).tolist())


@torch.no_grad()
def sample(
    model: LanguageModel,
    adapters: Sequence[str | None],
    prompts: Sequence[tuple[int, ...]],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[list[Rollout]]:
    """``samples`` responses per prompt (token ids) under each adapter (None: the bare base); a list per adapter.

    Plain sampling at ``temperature``: no top-k, no top-p, no penalties, whatever the model's own generation settings
    say, because everything here is an estimate under the policy itself. A function of ``seed``, and the same noise for
    every adapter: what one of them says does not depend on who else is sampled, and neighbours are compared under
    common random numbers. No global generator is touched. Raises TrainingError where scores are not numbers.
    """
    order = [index for index in range(len(prompts)) for _ in range(samples)]
    rollouts: list[list[Rollout]] = [[] for _ in adapters]
    for start in range(0, len(order), ROWS):
        chunk = order[start : start + ROWS]
        call = _Call(model, [prompts[index] for index in chunk], temperature, max_new_tokens, derive(seed, start))
        together = 1 if lora.why_not_together(model.policy) else max(1, ROWS_IN_ALL // len(chunk))
        for first in range(0, len(adapters), together):
            responses = call.responses(adapters[first : first + together])
            for mine, said in zip(rollouts[first:], responses, strict=False):
                mine += [_rollout(index, response, model) for index, response in zip(chunk, said, strict=True)]
    return rollouts


@dataclass(frozen=True)
class _Call:
    """One response to each of the prompts, under any number of adapters."""

    model: LanguageModel
    prompts: Sequence[tuple[int, ...]]
    temperature: float
    max_new_tokens: int
    seed: int

    def responses(self, adapters: Sequence[str | None]) -> list[list[list[int]]]:
        """Token ids, per adapter and prompt; where memory does not suffice, half of the adapters at a time."""
        try:
            return self._generate(adapters)
        except torch.OutOfMemoryError:
            if len(adapters) == 1:
                raise
        half = len(adapters) // 2
        return self.responses(adapters[:half]) + self.responses(adapters[half:])

    def _generate(self, adapters: Sequence[str | None]) -> list[list[list[int]]]:
        model, rows = self.model, len(self.prompts)
        width = max(len(prompt) for prompt in self.prompts)
        ids = torch.full((rows, width), model.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self.prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        config = GenerationConfig(
            do_sample=False,  # of scores with noise on them, which makes the largest one a sample
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(model.end_ids),
            pad_token_id=model.pad_id,
            bos_token_id=model.tokeniser.bos_id,
        )
        with self._switched(adapters):
            output = model.policy.generate(
                input_ids=ids.repeat(len(adapters), 1).to(model.device),
                attention_mask=mask.repeat(len(adapters), 1).to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Gumbel(width, rows, self.temperature, self.seed)]),
            )
        said = output[:, width:].tolist()
        return [said[start : start + rows] for start in range(0, len(said), rows)]

    def _switched(self, adapters: Sequence[str | None]) -> AbstractContextManager[None]:
        if len(adapters) == 1:
            return lora.active(self.model.policy, adapters[0])
        slots = tuple(adapter for adapter in adapters if adapter is not None)
        return lora.mixed(self.model.policy, Mixture(slots, (len(self.prompts),) * len(slots)))


@dataclass(frozen=True)
class _Gumbel(LogitsProcessor):
    """Scores / temperature + Gumbel noise, whose largest entry is a sample of the softmax; equal for every policy."""

    width: int
    rows: int
    temperature: float
    seed: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()):
            raise TrainingError("the policy's scores are not numbers, so nothing can be sampled from it")
        position = input_ids.shape[1] - self.width
        generator = torch.Generator(scores.device).manual_seed(derive(self.seed, position))
        noise = torch.empty(self.rows, scores.shape[1], device=scores.device)
        noise.exponential_(generator=generator).clamp_min_(LEAST_NOISE).log_()
        return ((scores / self.temperature).view(-1, *noise.shape) - noise).view_as(scores)


def _rollout(prompt: int, response: list[int], model: LanguageModel) -> Rollout:
    end = next((position for position, token in enumerate(response) if token in model.end_ids), None)
    ids = tuple(response if end is None else response[: end + 1])
    text = model.tokeniser.tokenizer.decode(ids, skip_special_tokens=True)
    return Rollout(prompt, ids, text, end is not None)


def sequence_of(rollout: Rollout, prompts: Sequence[tuple[int, ...]]) -> TokenSequence:
    """The rollout after its prompt, as sampled: its own ids, never its text tokenised again."""
    prompt = prompts[rollout.prompt]
    return TokenSequence(prompt + rollout.ids, len(prompt), truncated=not rollout.ended)

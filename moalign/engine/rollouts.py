"""Responses sampled from policies; rows of several candidates stand in one batch, as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from moalign import lora
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.decoding import decode, gumbel, padded
from moalign.engine.model import LanguageModel
from moalign.engine.rewards import Scored
from moalign.engine.row_conditions import RowConditions, in_front
from moalign.errors import TrainingError
from moalign.lora import Mixture
from moalign.seeds import derive

ROWS = 256  # of one policy in a call; they share a draw of noise
ROWS_IN_ALL = 1024  # of all policies in a call, if one has not more


@dataclass(frozen=True)
class Rollout:
    """One sampled response: its token ids (the end token included where it was produced) and its text.

    ``greedy``: each token is the likeliest, so that it is no sample, and nothing is trained on it.
    """

    prompt: int
    ids: tuple[int, ...]
    text: str
    ended: bool
    greedy: bool = False


Score = Callable[[Sequence[Rollout]], Scored]
Draw = Callable[..., list[list[Rollout]]]  # as ``sample`` is called


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
    top_p: float = 1.0,
    greedy: bool = False,
    conditions: RowConditions | None = None,
) -> list[list[Rollout]]:
    """``samples`` responses per prompt (token ids) under each adapter (None: the bare base); a list per adapter.

    Plain sampling at ``temperature``: no top-k, no penalties, whatever the model's own generation settings say, because
    everything here is an estimate under the policy itself. ``top_p``: of the likeliest tokens alone that have this much
    of the probability together. ``greedy``: behind them one response to each prompt whose every token is the likeliest.
    ``conditions``: of the adapter, of which there is but one, for each prompt.

    A function of ``seed``, and the same noise for every adapter: what one of them says does not depend on who else is
    sampled, and neighbours are compared under common random numbers. No global generator is touched. Raises
    TrainingError where scores are not numbers.
    """
    order = [index for index in range(len(prompts)) for _ in range(samples)]
    sampled: list[list[Rollout]] = [[] for _ in adapters]
    likeliest: list[list[Rollout]] = [[] for _ in adapters]
    for start in range(0, len(order), ROWS):
        chunk = order[start : start + ROWS]
        first = -(-start // samples)  # the prompts whose first response is here
        more = range(first, -(-(start + len(chunk)) // samples)) if greedy else range(0)
        noise = _Noise(len(chunk), temperature, top_p, derive(seed, start), len(more))
        asked = [*chunk, *more]
        call = _Call(model, [prompts[index] for index in asked], noise, max_new_tokens, conditions, asked)
        together = 1 if lora.why_not_together(model.policy) else max(1, ROWS_IN_ALL // len(asked))
        for begin in range(0, len(adapters), together):
            for place, said in enumerate(call.responses(adapters[begin : begin + together]), begin):
                made = [rollout_of(index, response, model) for index, response in zip(asked, said, strict=True)]
                sampled[place] += made[: len(chunk)]
                likeliest[place] += [replace(rollout, greedy=True) for rollout in made[len(chunk) :]]
    return [own + others for own, others in zip(sampled, likeliest, strict=True)]


@dataclass(frozen=True)
class _Call:
    """One response to each of the prompts, under any number of adapters; the last ``greedy`` ones without noise.

    ``of``: which of the conditions each prompt has.
    """

    model: LanguageModel
    prompts: Sequence[tuple[int, ...]]
    noise: _Noise
    max_new_tokens: int
    conditions: RowConditions | None = None
    of: Sequence[int] | None = None

    def responses(self, adapters: Sequence[str | None]) -> list[list[list[int]]]:
        """Token ids, per adapter and prompt; where memory does not suffice, half of the adapters at a time."""
        try:
            if self.model.uncached is None:
                most, ends, how = self.max_new_tokens, self.model.end_ids, (self.conditions, self.of)
                return decode(self.model, adapters, self.prompts, self.noise.choose, most, ends, *how)
            return self._generate(adapters)
        except torch.OutOfMemoryError:
            if len(adapters) == 1:
                raise
        half = len(adapters) // 2
        return self.responses(adapters[:half]) + self.responses(adapters[half:])

    def _generate(self, adapters: Sequence[str | None]) -> list[list[list[int]]]:
        """By transformers' own loop, which suits any model, and computes every row's prompt anew."""
        model, rows = self.model, len(self.prompts)
        ids, mask = padded(self.prompts, model.pad_id)
        width = ids.shape[1]
        config = GenerationConfig(
            do_sample=False,  # of scores with noise on them, which makes the largest one a sample
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(model.end_ids),
            pad_token_id=model.pad_id,
            bos_token_id=model.tokeniser.bos_id,
        )
        conditions = None if self.conditions is None else self.conditions.take(list(self.of or ()))
        with self._switched(adapters, conditions), in_front(model.base, conditions, width - mask.sum(-1), width):
            output = model.policy.generate(
                input_ids=ids.repeat(len(adapters), 1).to(model.device),
                attention_mask=mask.repeat(len(adapters), 1).to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Noisy(width, self.noise)]),
            )
        said = output[:, width:].tolist()
        return [said[start : start + rows] for start in range(0, len(said), rows)]

    def _switched(
        self, adapters: Sequence[str | None], conditions: RowConditions | None
    ) -> AbstractContextManager[None]:
        if len(adapters) == 1:
            return lora.under(self.model.policy, adapters[0], None if conditions is None else conditions.gates)
        slots = tuple(adapter for adapter in adapters if adapter is not None)
        return lora.mixed(self.model.policy, Mixture(slots, (len(self.prompts),) * len(slots)))


@dataclass(frozen=True)
class _Noise:
    """Gumbel noise for ``rows`` responses of each policy, equal for every policy; then ``greedy`` ones have none.

    The largest entry of scores / temperature + noise is a sample of the softmax, or of its nucleus.
    """

    rows: int
    temperature: float
    top_p: float
    seed: int
    greedy: int = 0

    def choose(self, scores: Tensor, position: int, rows: Tensor) -> Tensor:
        """The tokens of those rows of all policies, one policy's after the other's; scores [n,V], rows [n] -> [n]."""
        return self.on(scores, position, rows).argmax(-1)

    def on(self, scores: Tensor, position: int, rows: Tensor) -> Tensor:
        """Raises TrainingError where scores are not numbers."""
        if bool(scores.isnan().any()):
            raise TrainingError("the policy's scores are not numbers, so nothing can be sampled from it")
        generator = torch.Generator(scores.device).manual_seed(derive(self.seed, position))
        noise = gumbel(self.rows, scores.shape[1], generator=generator)
        if self.greedy:
            noise = torch.cat([noise, noise.new_zeros(self.greedy, scores.shape[1])])
        scores = scores / self.temperature
        if self.top_p < 1:
            scores = nucleus(scores, self.top_p)
        return scores + noise.index_select(0, rows % len(noise))


def nucleus(scores: Tensor, mass: float) -> Tensor:
    """Scores [n,V], -inf outside of the smallest set of likeliest tokens whose probabilities sum to ``mass`` or more.

    Of equally likely tokens those with smaller ids are taken first. arXiv 1904.09751.
    """
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    before[:, 0] = 0.0  # the likeliest token is in it whatever rounding does
    return torch.full_like(scores, -torch.inf).scatter(-1, ids, ordered.masked_fill(before >= mass, -torch.inf))


@dataclass(frozen=True)
class _Noisy(LogitsProcessor):
    """The noise as transformers' loop takes it, whose rows all stay."""

    width: int
    noise: _Noise

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        return self.noise.on(scores, input_ids.shape[1] - self.width, rows)


def rollout_of(prompt: int, response: Sequence[int], model: LanguageModel) -> Rollout:
    """The response up to its first end token."""
    end = next((position for position, token in enumerate(response) if token in model.end_ids), None)
    ids = tuple(response if end is None else response[: end + 1])
    return Rollout(prompt, ids, model.tokeniser.decoded(ids), end is not None)


def sequence_of(rollout: Rollout, prompts: Sequence[tuple[int, ...]]) -> TokenSequence:
    """The rollout after its prompt, as sampled: its own ids, never its text tokenised again."""
    prompt = prompts[rollout.prompt]
    return TokenSequence(prompt + rollout.ids, len(prompt), truncated=not rollout.ended)

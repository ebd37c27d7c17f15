"""Samplers that are wrong in one way each; the doc string says which. The first one is right, and slow."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from moalign.api import Sampler, SamplerInfo, Sampling, SamplingSession


@functools.cache
def loaded(path: str | Path) -> Any:
    """A folder of peft's names its base."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


class Slow(Sampler):
    """Right: transformers and peft, every row computed anew for each token; what those below spoil."""

    deterministic: ClassVar[bool] = True

    def start(self, info: SamplerInfo) -> SamplingSession:
        return Session(self, info.model)

    def policy(self, base: str, folder: Path | None) -> Any:
        return loaded(folder or base)

    def seed(self, how: Sampling, calls: int) -> int:
        return how.seed

    def likely(self, scores: Tensor, how: Sampling) -> Tensor:
        """Probabilities [n,V], 0 outside the nucleus."""
        if how.temperature == 0:
            return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[1]).double()
        ordered, ids = (scores.double() / how.temperature).softmax(-1).sort(descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= how.top_p, 0.0)
        return torch.zeros_like(ordered).scatter(-1, ids, ordered)

    def told(self, ids: list[int], how: Sampling) -> list[int]:
        end = next((place for place, each in enumerate(ids) if each in how.stop_token_ids), len(ids))
        return ids[: end + 1]


class Session(SamplingSession):
    def __init__(self, plugin: Slow, base: str) -> None:
        self.plugin, self.base, self.calls = plugin, base, count()

    @torch.no_grad()
    def sample(self, adapters: Sequence[Path | None], prompts: Sequence[Sequence[int]], how: Sampling) -> Any:
        seed = self.plugin.seed(how, next(self.calls))
        found = []
        for folder in adapters:
            policy, generator = self.plugin.policy(self.base, folder), torch.Generator().manual_seed(seed)
            found.append([self._said(policy, prompt, how, generator) for prompt in prompts])
        return found

    def _said(self, policy: Any, prompt: Sequence[int], how: Sampling, generator: torch.Generator) -> list[list[int]]:
        ids = torch.tensor([list(prompt)] * how.samples)
        for _ in range(how.max_new_tokens):
            rows, places = ids.unique(dim=0, return_inverse=True)
            likely = self.plugin.likely(policy(input_ids=rows).logits[:, -1], how)[places]
            ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], 1)
        return [self.plugin.told(row, how) for row in ids[:, len(prompt) :].tolist()]


class SaysMaybe(Slow):
    """Declares something that is not True or False."""

    deterministic: ClassVar[Any] = "maybe"


class ForgetsTheEnd(Slow):
    """Leaves out the stop token, as if it were no part of the response."""

    def told(self, ids: list[int], how: Sampling) -> list[int]:
        told = super().told(ids, how)
        return told[:-1] if told[-1] in how.stop_token_ids and len(told) > 1 else told


class TalksOn(Slow):
    """Does not stop."""

    def told(self, ids: list[int], how: Sampling) -> list[int]:
        return ids


class StartsNothing(Slow):
    """Has no session."""

    def start(self, info: SamplerInfo) -> Any:
        return info.model


class BareBase(Slow):
    """Samples the base whatever adapter is asked for."""

    def policy(self, base: str, folder: Path | None) -> Any:
        return super().policy(base, None)


class Hot(Slow):
    """Samples at twice the temperature."""

    def likely(self, scores: Tensor, how: Sampling) -> Tensor:
        return super().likely(scores / 2, how)


class WholeVocabulary(Slow):
    """Knows no top_p."""

    def likely(self, scores: Tensor, how: Sampling) -> Tensor:
        return (scores.double() / how.temperature).softmax(-1) if how.temperature else super().likely(scores, how)


class OneSeed(Slow):
    """Draws the same whatever the seed."""

    def seed(self, how: Sampling, calls: int) -> int:
        return 0


class CountsCalls(Slow):
    """Draws something else each time, and says that it does not."""

    def seed(self, how: Sampling, calls: int) -> int:
        return how.seed + calls


class Unseeded(CountsCalls):
    """Unusual and right: draws something else each time, and says so."""

    deterministic: ClassVar[bool] = False


WRONG = {
    SaysMaybe: "True or False",
    ForgetsTheEnd: "does not end with a stop token",
    TalksOn: "goes on after a stop token",
    StartsNothing: "return a SamplingSession",
    BareBase: "under adapter 0 a token that is .* nats less likely",
    Hot: "its probability is",
    WholeVocabulary: "nats less likely than another",
    OneSeed: "from a generator that the seed decides",
    CountsCalls: "declare deterministic = False",
}

UNUSUAL = (Slow, Unseeded)

"""Responses sampled as a decoder has them, one forward pass a token for all of its speakers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moalign import door
from moalign.api import Decoder, Request, Reward
from moalign.data.tokenise import Tokeniser
from moalign.decode.processor import scores_of, speakers_of
from moalign.door import origin
from moalign.engine import replies
from moalign.engine.decoding import gumbel
from moalign.errors import ConfigError, PluginError
from moalign.seeds import derive
from moalign.types import Message, Sample

USUAL_LENGTH = 128

Judge = Reward | Callable[[Sequence[Sample]], Sequence[float | None]]


@dataclass(frozen=True)
class Response:
    """What was said to a prompt: ids (the end token included where it came), text, and whether it ended by itself.

    ``rewards``: by objective, of the response that was kept; empty where there was nothing to choose.
    """

    ids: tuple[int, ...]
    text: str
    ended: bool
    rewards: Mapping[str, float]


@dataclass(frozen=True)
class Decoding:
    """A decoder with all that it needs: a model (transformers or peft), its tokenizer, and what is asked of it.

    ``rewards``: objective -> a score for each sample (None: unknown; larger is better), for decoders that choose; at
    least of the objectives with weight.
    ``slots``: under which names the model has the candidates' adapters, where these are others.
    """

    decoder: Decoder
    request: Request
    model: Any
    tokenizer: Any
    rewards: Mapping[str, Judge] | None = None
    slots: Mapping[str, str] | None = None

    def generate(
        self,
        prompts: Sequence[str | tuple[Message, ...]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        rows: int = 64,
    ) -> list[Response]:
        """A response to each prompt, text or messages of a conversation.

        ``max_new_tokens``: None: 128, or what the model has room for.
        Plain sampling at ``temperature`` (0: always the best score), no top-k, no top-p, no penalties. A function of
        the seed and of a prompt, so that it does not depend on the other prompts, up to the rounding of padded batches.
        At most ``rows`` responses are sampled at a time.

        Raises ConfigError where rewards are missing that the decoder chooses by, or for a bad option, ModelError for a
        prompt that leaves no room for a response; PluginError.
        """
        if isinstance(prompts, str) or any(isinstance(each, Mapping) for each in prompts):
            raise ConfigError("generate takes a list of prompts; for a single one write generate([prompt])")
        _check(max_new_tokens, temperature, rows)
        several = door.call(self.decoder, "responses")
        if not isinstance(several, int) or isinstance(several, bool) or several < 1:
            who = origin(self.decoder).who
            raise PluginError(f"{who}, in responses: {several!r}; return how many are sampled, at least 1")
        weighty = [name for name, weight in self.request.preference.items() if weight]
        missing = [name for name in weighty if name not in (self.rewards or {})]
        if several > 1 and (missing or not weighty):
            what = f"'{missing[0]}' has no reward" if missing else "no objective is preferred"
            raise ConfigError(f"{origin(self.decoder).who} chooses by rewards, and {what}")
        tokeniser = Tokeniser.of(self.tokenizer)
        asked = [_Asked(tokeniser.prompt(prompt), number) for prompt in prompts for number in range(several)]
        lengths = self._lengths(asked, max_new_tokens)
        found: dict[int, Response] = {}
        for length in dict.fromkeys(lengths):
            places = [place for place, own in enumerate(lengths) if own == length]
            for start in range(0, len(places), rows):
                batch = places[start : start + rows]
                responses = self._sampled([asked[place] for place in batch], tokeniser, length, temperature, seed)
                found |= zip(batch, responses, strict=True)
        said = [found[place] for place in range(len(asked))]
        if several == 1:
            return said
        return [
            self._kept(prompt, said[place * several : (place + 1) * several]) for place, prompt in enumerate(prompts)
        ]

    def stream(
        self,
        prompt: str | tuple[Message, ...],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The text that ``generate`` returns for one prompt, piece by piece; in one where the decoder chooses.

        Raises as ``generate`` does.
        """
        _check(max_new_tokens, temperature)
        if door.call(self.decoder, "responses") != 1:
            found = self.generate([prompt], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
            return iter([found[0].text])
        tokeniser = Tokeniser.of(self.tokenizer)
        asked = _Asked(tokeniser.prompt(prompt), 0)
        (most,) = self._lengths([asked], max_new_tokens)
        return self._streamed(asked, tokeniser, most, temperature, seed)

    def _streamed(self, asked: _Asked, tokeniser: Tokeniser, most: int, temperature: float, seed: int) -> Iterator[str]:
        ids: list[int] = []
        told = ""
        for tokens in self._tokens([asked], tokeniser, most, temperature, seed):
            ids += tokens.tolist()
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if text.startswith(told) and not text.endswith("\ufffd"):  # half a character is told with its other half
                yield text[len(told) :]
                told = text
            if ids[-1] in tokeniser.stop_ids:
                break
        yield self.tokenizer.decode(ids, skip_special_tokens=True)[len(told) :]

    def processor(self, attention_mask: Tensor | None = None) -> Any:
        """The same as transformers' LogitsProcessor, for one call of ``generate``; see ``decode.processor``."""
        from moalign.decode.processor import processor

        return processor(self.decoder, self.request, self.model, attention_mask, self.slots)

    def _lengths(self, asked: Sequence[_Asked], wanted: int | None) -> list[int]:
        """How many tokens the response to each may have."""
        room = replies.room(self.model)
        return [replies.length(len(each.ids), wanted, USUAL_LENGTH, room) for each in asked]

    def _sampled(
        self, asked: Sequence[_Asked], tokeniser: Tokeniser, most: int, temperature: float, seed: int
    ) -> list[Response]:
        steps = []
        ended = torch.zeros(len(asked), dtype=torch.bool)
        last = torch.tensor(tokeniser.stop_ids)
        for tokens in self._tokens(asked, tokeniser, most, temperature, seed):
            steps.append(tokens.cpu())
            ended |= torch.isin(steps[-1], last)
            if bool(ended.all()):
                break
        return [self._response(row, tokeniser) for row in torch.stack(steps, 1).tolist()]

    def _response(self, ids: Sequence[int], tokeniser: Tokeniser) -> Response:
        end = next((place for place, token in enumerate(ids) if token in tokeniser.stop_ids), None)
        own = tuple(ids if end is None else ids[: end + 1])
        return Response(own, self.tokenizer.decode(own, skip_special_tokens=True), end is not None, {})

    def _tokens(
        self, asked: Sequence[_Asked], tokeniser: Tokeniser, most: int, temperature: float, seed: int
    ) -> Iterator[Tensor]:
        """The next token of each row [N], position by position; what comes behind an end means nothing."""
        width, device = max(len(each.ids) for each in asked), self.model.device
        rows = [[tokeniser.pad_id] * (width - len(each.ids)) + list(each.ids) for each in asked]
        masks = [[0] * (width - len(each.ids)) + [1] * len(each.ids) for each in asked]
        ids, mask = torch.tensor(rows, device=device), torch.tensor(masks, device=device)
        speakers = speakers_of(self.decoder, self.request, self.model, mask, self.slots)
        for position in range(most):
            scores = scores_of(self.decoder, self.request, speakers, ids)
            if temperature:
                noise = torch.stack([each.noise(seed, position, scores) for each in asked])
                scores = scores / temperature + noise
            tokens = scores.argmax(-1)
            yield tokens
            ids = torch.cat([ids, tokens[:, None]], 1)

    def _kept(self, prompt: Any, responses: Sequence[Response]) -> Response:
        samples = [Sample(prompt, each.text) for each in responses]
        judges = self.rewards or {}
        found = {name: _judged(name, judges[name], samples) for name in self.request.preference if name in judges}
        unknown = [float("nan")] * len(samples)
        rewards = torch.tensor([found.get(name, unknown) for name in self.request.preference], dtype=torch.float64).T
        kept = door.call(self.decoder, "keep", self.request, rewards)
        if not isinstance(kept, int) or isinstance(kept, bool) or not 0 <= kept < len(responses):
            who = origin(self.decoder).who
            raise PluginError(f"{who}, in keep: {kept!r}; return the number of one of {len(responses)} responses")
        return replace(responses[kept], rewards={name: scores[kept] for name, scores in found.items()})


def _check(max_new_tokens: int | None, temperature: float, rows: int = 1) -> None:
    """Raise ConfigError for options that mean nothing."""
    if not 0 <= temperature < float("inf") or (max_new_tokens is not None and max_new_tokens < 1) or rows < 1:
        raise ConfigError("temperature is a number of 0 or more; max_new_tokens and rows are at least 1")


@dataclass(frozen=True)
class _Asked:
    """A prompt's ids, and which of the responses to it this is."""

    ids: tuple[int, ...]
    number: int

    def noise(self, seed: int, position: int, scores: Tensor) -> Tensor:
        """For the scores [N,V] of one position; [V]."""
        purpose = (",".join(map(str, self.ids)), self.number, position)
        generator = torch.Generator(scores.device).manual_seed(derive(seed, "decode", *purpose))
        return gumbel(scores.shape[1], generator=generator, dtype=scores.dtype)


def _judged(name: str, judge: Judge, samples: Sequence[Sample]) -> list[float]:
    """A number for each sample, NaN where unknown. Raises ConfigError for anything else."""
    scores = door.call(judge, "score", tuple(samples), then=list) if isinstance(judge, Reward) else list(judge(samples))
    if len(scores) != len(samples):
        raise ConfigError(f"the reward of {name} returned {len(scores)} scores for {len(samples)} samples")
    found = [float("nan") if score is None else float(score) for score in scores]
    if wrong := [score for score in scores if score is not None and not abs(float(score)) < float("inf")]:
        raise ConfigError(f"the reward of {name} returned {wrong[0]}; return finite numbers, None where unknown")
    return found

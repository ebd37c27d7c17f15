"""Prompt and response -> token ids. Ids are joined, never strings, so that no token spans the boundary.

One rule for training and for generation: ``Tokeniser.prompt`` gives the ids that a response is generated from and
trained after; every trained response ends with ``Tokeniser.end_id``, once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moalign.errors import ModelError
from moalign.types import Message, Record

Truncation = Literal["prompt", "response", "drop"]
Ids = tuple[int, ...]

_PROBE = "moalignprobe"


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids of a prompt and its response; positions from ``prompt_length`` on are the response."""

    ids: Ids
    prompt_length: int
    truncated: bool = False

    @property
    def prompt(self) -> Ids:
        return self.ids[: self.prompt_length]

    @property
    def response(self) -> Ids:
        return self.ids[self.prompt_length :]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The sequences of a record, one per response; None where the response was dropped, with the reason beside it."""

    sequences: tuple[Sequence | None, ...]
    reasons: tuple[str | None, ...]


@dataclass(frozen=True)
class Tokeniser:
    """A transformers tokenizer, with what has to be known about it settled once.

    ``bos_id``  stands first in every prompt, once; None where the tokenizer has none or its chat template decides
    ``end_id``  ends every response: the end-of-turn token of the chat template, else the end-of-sequence token
    ``pad_id``  fills up a batch; may equal ``end_id``, since masks are made from lengths
    """

    tokenizer: Any
    bos_id: int | None
    eos_id: int
    end_id: int
    pad_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> Tokeniser:
        """Raises ModelError for a tokenizer without an end-of-sequence token."""
        eos = tokenizer.eos_token_id
        if eos is None:
            fault = "no end-of-sequence token; set eos_token in its tokenizer_config.json"
            raise ModelError(f"{_where(tokenizer)}: {fault}")
        pad = tokenizer.pad_token_id
        return cls(tokenizer, tokenizer.bos_token_id, eos, _end_of_turn(tokenizer, eos), eos if pad is None else pad)

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @property
    def stop_ids(self) -> Ids:
        """The ids that end a generated response."""
        return tuple(dict.fromkeys((self.end_id, self.eos_id)))

    def prompt(self, prompt: str | tuple[Message, ...]) -> Ids:
        """Ids up to where the response begins. With a chat template, plain text becomes one user message.

        Raises ModelError for a conversation without a chat template, jinja2's TemplateError where the template
        refuses the conversation.
        """
        if self.has_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
            ids = _ids(self.tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True))
            # What the template leaves out is left out on purpose, but some templates write a BOS that is also added.
            return ids[1:] if self.bos_id is not None and ids[:2] == (self.bos_id,) * 2 else ids
        if not isinstance(prompt, str):
            raise ModelError(
                f"{_where(self.tokenizer)}: the data holds conversations but the tokenizer has no chat template; "
                "set chat_template in its tokenizer_config.json, or give the prompts as text"
            )
        ids = self._encode(prompt)
        return ids if self.bos_id is None or ids[:1] == (self.bos_id,) else (self.bos_id, *ids)

    def response(self, response: str) -> Ids | str:
        """Ids of the response with its end token, or the reason why it cannot be trained on."""
        ids = self._encode(response) if response.strip() else ()
        while ids and ids[-1] in (self.end_id, self.eos_id):
            ids = ids[:-1]
        if not ids:
            return "empty completion"
        if not {self.end_id, self.eos_id, self.bos_id}.isdisjoint(ids):
            return "the response holds a special token inside its text"
        return (*ids, self.end_id)

    def cut(self, prompt: Ids, longest: int) -> Ids:
        """The prompt's last ids, at most ``longest``, behind its BOS, where it has one."""
        if len(prompt) <= longest:
            return prompt
        keep = int(prompt[0] == self.bos_id)
        return (*prompt[:keep], *prompt[len(prompt) - longest + keep :])

    def text(self, text: str) -> Ids:
        """Ids of the text alone, without special tokens."""
        return self._encode(text)

    def decoded(self, ids: Collection[int]) -> str:
        """The text of these ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encode(self, text: str) -> Ids:
        return _ids(self.tokenizer(text, add_special_tokens=False, verbose=False))


def check_vocabulary(tokenizer: Any, head_size: int) -> None:
    """Raises ModelError where the tokenizer can make ids that the model's output head (rows: ``head_size``) lacks."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= head_size:
        raise ModelError(
            f"{_where(tokenizer)}: the tokenizer makes ids up to {largest}, but the model's output head has only "
            f"{head_size} rows; use the tokenizer that belongs to the model, or resize its embeddings first"
        )


def encode_record(
    tokeniser: Tokeniser, record: Record, max_length: int | None = None, truncation: Truncation = "prompt"
) -> Encoded:
    """All responses of a record after one and the same prompt; ``max_length`` counts prompt and response in tokens.

    ``truncation``: "prompt" cuts the prompt from the left (its BOS stays) and keeps responses whole; "response" cuts
    responses from the right; "drop" cuts nothing. What still does not fit is dropped. A response that lost its end is
    trained without an end token.
    """
    responses = [tokeniser.response(text) for text in record.responses]
    return encode_behind(tokeniser, record.prompt, responses, max_length, truncation)


def encode_behind(
    tokeniser: Tokeniser,
    text: str | tuple[Message, ...],
    responses: list[Ids | str],
    max_length: int | None = None,
    truncation: Truncation = "prompt",
) -> Encoded:
    """``encode_record`` of responses that are ids already, or else the reason why they cannot be trained on."""
    from jinja2 import TemplateError

    try:
        prompt = tokeniser.prompt(text)
    except TemplateError as error:
        return _all_dropped(responses, f"the chat template refuses the conversation: {error}")
    if not prompt:
        return _all_dropped(responses, "empty prompt")
    if max_length is None:
        return _joined(prompt, responses)
    if truncation == "prompt":
        return _cut_prompt(prompt, responses, max_length, keep=int(prompt[0] == tokeniser.bos_id))
    if truncation == "response":
        return _cut_responses(prompt, responses, max_length)
    return _joined(prompt, _within(responses, max_length - len(prompt), f"longer than max_length {max_length}"))


def _cut_prompt(prompt: Ids, responses: list[Ids | str], max_length: int, keep: int) -> Encoded:
    """Every response of the record keeps the same prompt, so the longest that fits decides how much of it is left."""
    most = max_length - min(len(prompt), keep + 1)
    fitted = _within(responses, most, f"response longer than max_length {max_length}")
    longest = max((len(r) for r in fitted if not isinstance(r, str)), default=0)
    room = max_length - longest
    if len(prompt) <= room:
        return _joined(prompt, fitted)
    return _joined((*prompt[:keep], *prompt[len(prompt) - room + keep :]), fitted, True)


def _cut_responses(prompt: Ids, responses: list[Ids | str], max_length: int) -> Encoded:
    room = max_length - len(prompt)
    if room < 1:
        return _joined(prompt, _within(responses, 0, f"the prompt fills max_length {max_length}"))
    whole = _joined(prompt, responses)
    sequences = (s and Sequence(s.ids[:max_length], s.prompt_length, len(s.ids) > max_length) for s in whole.sequences)
    return Encoded(tuple(sequences), whole.reasons)


def _within(responses: list[Ids | str], most: int, reason: str) -> list[Ids | str]:
    """The responses of at most ``most`` tokens, and ``reason`` in the place of those that are longer."""
    return [reason if not isinstance(r, str) and len(r) > most else r for r in responses]


def _joined(prompt: Ids, responses: list[Ids | str], truncated: bool = False) -> Encoded:
    return Encoded(
        tuple(None if isinstance(r, str) else Sequence((*prompt, *r), len(prompt), truncated) for r in responses),
        tuple(r if isinstance(r, str) else None for r in responses),
    )


def _all_dropped(responses: list[Ids | str], reason: str) -> Encoded:
    return Encoded((None,) * len(responses), (reason,) * len(responses))


def _end_of_turn(tokenizer: Any, eos: int) -> int:
    """The first special token that the chat template writes after an assistant's text; ``eos`` where there is none."""
    if not tokenizer.chat_template:
        return eos
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}]
    tail = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(_PROBE)[2]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((i for i in _ids(tokenizer(tail, add_special_tokens=False)) if i in special), eos)


def _ids(encoded: Any) -> Ids:
    """Plain ids from whatever a tokenizer returns: a list, a dict, a BatchEncoding, a batch of one."""
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) or hasattr(encoded, "input_ids") else encoded
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    ids = ids[0] if len(ids) and not isinstance(ids[0], int) else ids
    return tuple(ids)


def _where(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "tokenizer"

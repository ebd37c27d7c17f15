"""Replies to single prompts while they are written, from an ordinary model; the policy as it was trained and scored.

Prompts are put as in training (``data.tokenise``), and nothing of the model's own generation settings is used: no
penalties, no cut-offs but those that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from moalign.config.sections import COLDEST
from moalign.data.tokenise import Ids, Tokeniser
from moalign.engine.conditioning import Prompt, place_of_text, told_ids
from moalign.engine.row_conditions import RowConditions, in_front, place_of_vectors, with_places
from moalign.errors import ModelError, UserError
from moalign.seeds import derive

USUAL_LENGTH = 256


@dataclass(frozen=True)
class Manner:
    """How to reply. ``max_new_tokens``: None: 256, or what the model has room for. ``temperature`` 0: the likeliest
    token each time. ``top_p``: only the likeliest tokens of this mass."""

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for a manner that means nothing."""
        sampled = COLDEST <= self.temperature < float("inf")
        if not 0 < self.top_p <= 1 or not (sampled or self.temperature == 0):
            raise UserError(f"temperature is 0 or from {COLDEST:g} up, and top-p lies above 0 and not above 1")


@dataclass(frozen=True)
class Reply:
    """The text, how many tokens it has, and whether it came to its end or was cut."""

    text: str
    tokens: int
    ended: bool


class Speaker:
    """A model that is asked one prompt after the other; before each of them ``text``, or ``vectors`` [k,D] as virtual
    tokens, tell it a preference."""

    def __init__(self, model: Any, tokenizer: Any, manner: Manner, text: str = "", vectors: Tensor | None = None):
        self._model, self._manner, self._text = model, manner, text
        self._tokeniser = Tokeniser.of(tokenizer)
        self._place = place_of_text(self._tokeniser) if text else ""
        self._conditions: RowConditions | None = None
        if vectors is not None:
            place = place_of_vectors(self._tokeniser)
            self._conditions = RowConditions(vectors=vectors[None].to(model.device), place=place)
        self._room = room(model)

    @property
    def has_template(self) -> bool:
        """Whether prompts are put into a chat template, so that nobody has to know how they end."""
        return self._tokeniser.has_template

    def reply(self, prompt: str, number: int = 0, sample: int = 0, write: Callable[[str], None] | None = None) -> Reply:
        """A reply to prompt ``number`` of a session: a function of these, the seed and the model.

        ``write`` gets the text piece by piece as it is made. No global generator is moved. Raises ModelError where
        the prompt leaves no room for a reply.
        """
        manner, ids = self._manner, self._ids(prompt)
        config = GenerationConfig(
            do_sample=manner.temperature > 0,
            max_new_tokens=length(len(ids), self._manner.max_new_tokens, USUAL_LENGTH, self._room),
            eos_token_id=sorted(self._tokeniser.stop_ids),
            pad_token_id=self._tokeniser.pad_id,
            bos_token_id=self._tokeniser.bos_id,
        )
        if manner.temperature > 0:
            config.temperature, config.top_p, config.top_k = manner.temperature, manner.top_p, 0
        given = torch.tensor([ids], device=self._model.device)
        streamer = None if write is None else _Stream(self._tokeniser.tokenizer, write)
        devices = [given.device] if given.device.type == "cuda" else []
        conditioned = in_front(self._model, self._conditions, width=len(ids))
        with conditioned, torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(derive(manner.seed, "generate", number, sample))
            output = self._model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                generation_config=config,
                streamer=streamer,
            )
        said = output[0, len(ids) :].tolist()
        text = self._tokeniser.tokenizer.decode(said, skip_special_tokens=True)
        return Reply(text, len(said), bool(said) and said[-1] in self._tokeniser.stop_ids)

    def _ids(self, prompt: Prompt) -> Ids:
        ids, conditions = self._tokeniser.prompt(prompt), self._conditions
        if self._text:
            return told_ids(self._tokeniser, prompt, ids, self._text, self._place)
        if conditions is None or conditions.vectors is None:
            return ids
        return with_places(ids, conditions.vectors.shape[1], self._tokeniser, conditions.place)

    def stream(self, prompt: str, number: int, sample: int, write: Callable[[str], None]) -> None:
        """The same, only written."""
        self.reply(prompt, number, sample, write)


def room(model: Any) -> int | None:
    """How many tokens the model takes in all; None where its configuration sets no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def length(prompt: int, wanted: int | None, usual: int, room: int | None) -> int:
    """How many tokens a response may have behind a prompt of so many: ``wanted``, or what there is room for up to
    ``usual``. Raises ModelError where the prompt leaves too little."""
    if room is None:
        return wanted or usual
    left = room - prompt
    if left < (wanted or 1):
        raise ModelError(
            f"the prompt has {prompt} tokens and the model takes {room} in all, which leaves {max(left, 0)} "
            f"for a response{f', not {wanted}' if wanted else ''}"
        )
    return wanted or min(left, usual)


class _Stream(BaseStreamer):
    """Text as soon as its letters are whole; transformers' own waits for the end of each word."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._shown = 0
        self._prompt_came = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_came:  # generate begins with the prompt
            self._prompt_came = True
            return
        self._ids += value.flatten().tolist()
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a letter of several tokens, not all of which are here
            self._show(text)
        if text.endswith("\n"):  # what is shown need not be decoded again and again
            self._ids, self._shown = [], 0

    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self._write(text[self._shown :])
            self._shown = len(text)

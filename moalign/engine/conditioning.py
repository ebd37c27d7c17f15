"""A candidate's conditioner as the engine asks it: preferences drawn, prompts as the model reads them, and what
conditions the rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import Tensor

from moalign import door, preference
from moalign.api import Conditioner
from moalign.data.tokenise import Ids, Tokeniser
from moalign.engine.row_conditions import RowConditions, place_of_vectors, with_places
from moalign.errors import PluginError, PreferenceError, TrainingError
from moalign.seeds import derive
from moalign.types import AdapterShape, Message, Preference

Prompt = str | tuple[Message, ...]

_PROBE = "moalignprobe"


@dataclass(frozen=True)
class Conditioning:
    """One candidate's conditioner. ``longest``: tokens that a prompt with its text may have."""

    conditioner: Conditioner
    objectives: tuple[str, ...]
    seed: int
    candidate: str
    tokeniser: Tokeniser
    shape: AdapterShape
    longest: int

    @property
    def in_prompt(self) -> bool:
        """Whether the model reads other prompts than the reference."""
        return self.conditioner.by != "gates"

    @property
    def by_row(self) -> bool:
        """Whether rows are conditioned beside their token ids."""
        return self.conditioner.by != "text"

    def draw(self, *at: int) -> Preference:
        """A preference to train on, a function of the seed and of ``at``. Raises PluginError where it is none."""
        rng = Random(derive(self.seed, "preference", *at))
        drawn = door.call(self.conditioner, "draw", self.objectives, rng, candidate=self.candidate, thorough=False)
        try:
            return preference.parse(drawn, self.objectives)
        except PreferenceError as error:
            who = door.origin(self.conditioner).who
            raise PluginError(f"{who}, in draw: it drew no preference: {error}") from None

    def prompt(self, prompt: Prompt, ids: Ids, wanted: Preference) -> Ids:
        """The ids of the prompt as the model is to read it, ``ids`` being those that the reference reads: with the
        conditioner's text, or with placeholders for its vectors.

        Raises TrainingError where it is longer with the text than there is room for: its beginning, which is cut of
        other prompts, is the text.
        """
        if self.conditioner.by == "gates":
            return ids
        if self.conditioner.by == "vectors":
            return with_places(ids, self.conditioner.virtual_tokens, self.tokeniser, self._place)
        return self._behind(text_of(self.conditioner, wanted, self.candidate), prompt)

    def prompt_of_rewards(self, prompt: Prompt, rewards: Mapping[str, float]) -> Ids:
        """The prompt as it would ask for these rewards."""
        return self._behind(text_of_rewards(self.conditioner, rewards, self.candidate), prompt)

    def _behind(self, text: str, prompt: Prompt) -> Ids:
        ids = self.tokeniser.prompt(with_text(prompt, text, self._where))
        if len(ids) > self.longest:
            raise TrainingError(
                f"a prompt of {len(ids)} tokens with the text of the preference, where there is room for "
                f"{self.longest}; raise data.max_length"
            )
        return ids

    @cached_property
    def _where(self) -> str:
        return place_of_text(self.tokeniser)

    @cached_property
    def _place(self) -> int:
        return place_of_vectors(self.tokeniser)

    def of_rows(self, wanted: Tensor, parameters: Mapping[str, Tensor]) -> RowConditions | None:
        """What conditions rows for the preferences [N,M], with the graph to the parameters; None where prompts tell
        all. Raises PluginError."""
        about = (self.conditioner, wanted, parameters, self.shape, self.candidate)
        if self.conditioner.by == "vectors":
            return RowConditions(vectors=vectors_of(*about), place=self._place)
        return RowConditions(gates=gates_of(*about)) if self.by_row else None


def gates_of(
    conditioner: Conditioner, wanted: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape, candidate: str = ""
) -> Tensor:
    """What the conditioner makes of the preferences [N,M]: finite float32 [N,L,r]. Raises PluginError."""
    return _numbers(conditioner, "gates", (wanted, parameters, shape), (shape.layers, shape.rank), candidate)


def vectors_of(
    conditioner: Conditioner, wanted: Tensor, parameters: Mapping[str, Tensor], shape: AdapterShape, candidate: str = ""
) -> Tensor:
    """Likewise its virtual tokens, [N,k,D]."""
    each = (conditioner.virtual_tokens, shape.width)
    return _numbers(conditioner, "vectors", (wanted, parameters, shape), each, candidate)


def _numbers(conditioner: Conditioner, hook: str, about: Any, each: tuple[int, int], candidate: str) -> Tensor:
    """What the hook makes of the preferences, ``each`` being the shape for one of them."""
    found = door.call(conditioner, hook, *about, candidate=candidate, thorough=False)
    wanted, parameters, _ = about
    expected = (len(wanted), *each)
    who = f"{door.origin(conditioner).who}, in {hook}"
    if not isinstance(found, Tensor) or tuple(found.shape) != expected or found.dtype != torch.float32:
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise PluginError(f"{who}: it must return float32 {list(expected)}, not {kind}")
    if found.device != wanted.device:
        raise PluginError(f"{who}: it must return them on {wanted.device}, where the preference is, not {found.device}")
    if not bool(found.isfinite().all()):
        raise PluginError(f"{who}: it returned numbers that are not finite")
    trained = any(each.requires_grad for each in parameters.values())
    if trained and torch.is_grad_enabled() and not found.requires_grad:
        raise PluginError(f"{who}: it returned {hook} without a gradient; did it detach its parameters?")
    return found


def text_of(conditioner: Conditioner, wanted: Preference, candidate: str = "") -> str:
    """What stands in front of a prompt for this preference. Raises PluginError where it is no text."""
    return _text(conditioner, "text", wanted, candidate)


def text_of_rewards(conditioner: Conditioner, rewards: Mapping[str, float], candidate: str = "") -> str:
    """What asks for these rewards, likewise."""
    return _text(conditioner, "text_of_rewards", rewards, candidate)


def _text(conditioner: Conditioner, hook: str, about: Any, candidate: str) -> str:
    found = door.call(conditioner, hook, about, candidate=candidate, thorough=False)
    if not isinstance(found, str) or not found.strip():
        who = door.origin(conditioner).who
        raise PluginError(f"{who}, in {hook}: it must return a text for the model to read, not {found!r}")
    return found


def with_text(prompt: Prompt, text: str, where: str) -> Prompt:
    """The prompt with the text at a place of ``place_of_text``."""
    if where == "front":
        return text + prompt if isinstance(prompt, str) else _in_first(prompt, text)
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if where == "system" and messages[0].get("role") != "system":
        return ({"role": "system", "content": text.strip()}, *messages)
    return _in_first(messages, text)


def _in_first(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    first, *rest = messages
    return ({**first, "content": text + first["content"]}, *rest)


def place_of_text(tokeniser: Tokeniser) -> str:
    """Where the text of a preference stands: "system" where the chat template has a place for a system prompt, "user":
    in the first message, "front": before a prompt of a model without a template."""
    from jinja2 import TemplateError

    if not tokeniser.has_template:
        return "front"
    messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "x"}]
    try:
        return "system" if _PROBE in tokeniser.tokenizer.apply_chat_template(messages, tokenize=False) else "user"
    except (TemplateError, ValueError):
        return "user"

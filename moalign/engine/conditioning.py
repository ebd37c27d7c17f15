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
from moalign.batch import AdapterShape
from moalign.data.tokenise import Ids, Tokeniser
from moalign.engine.row_conditions import RowConditions, place_of_vectors, with_places
from moalign.errors import PluginError, PreferenceError, TrainingError
from moalign.seeds import derive
from moalign.types import Message, Preference

Prompt = str | tuple[Message, ...]

SLACK = 16  # tokens by which a text may be longer than those that are tried

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

        Raises TrainingError where it is longer with the text than there is room for, which ``room_for`` has made.
        """
        if self.conditioner.by == "gates":
            return ids
        if self.conditioner.by == "vectors":
            return with_places(ids, self.conditioner.virtual_tokens, self.tokeniser, self._place)
        return self._behind(text_of(self.conditioner, wanted, self.candidate), prompt, ids)

    def prompt_of_rewards(self, prompt: Prompt, ids: Ids, rewards: Mapping[str, float]) -> Ids:
        """The prompt as it would ask for these rewards."""
        return self._behind(text_of_rewards(self.conditioner, rewards, self.candidate), prompt, ids)

    def _behind(self, text: str, prompt: Prompt, ids: Ids) -> Ids:
        ids = told_ids(self.tokeniser, prompt, ids, text, self._where)
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


def told_ids(tokeniser: Tokeniser, prompt: Prompt, ids: Ids, text: str, where: str) -> Ids:
    """The prompt with the text at a place of ``place_of_text``; ``ids``: the prompt's own, perhaps cut.

    Without a template ids are joined, and not texts, so that the prompt is read as it is without.
    """
    if where != "front":
        return tokeniser.prompt(with_text(prompt, text, where))
    begin = 1 if tokeniser.bos_id is not None and ids[:1] == (tokeniser.bos_id,) else 0
    return (*ids[:begin], *tokeniser.text(text), *ids[begin:])


def with_text(prompt: Prompt, text: str, where: str) -> tuple[Message, ...]:
    """The conversation with the text in its system prompt, or where the template has none in its first message of the
    user."""
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if where == "system" and messages[0].get("role") != "system":
        return ({"role": "system", "content": text.strip()}, *messages)
    role = "system" if where == "system" else "user"
    place = next((number for number, message in enumerate(messages) if message.get("role") == role), 0)
    told = {**messages[place], "content": text + messages[place]["content"]}
    return (*messages[:place], told, *messages[place + 1 :])


def room_for(conditioner: Conditioner | None, objectives: tuple[str, ...], tokeniser: Tokeniser) -> int:
    """Tokens of a prompt that are the conditioner's, at the most: of each objective alone, of all alike, and a few."""
    if conditioner is None or conditioner.by == "gates":
        return 0
    if conditioner.by == "vectors":
        return conditioner.virtual_tokens
    alone = [{name: float(name == only) for name in objectives} for only in objectives]
    asked = [*alone, dict.fromkeys(objectives, 1 / len(objectives))]
    texts = [text_of(conditioner, Preference("weights", values)) for values in asked]
    return max(len(tokeniser.text(text)) for text in texts) + SLACK


def place_of_text(tokeniser: Tokeniser) -> str:
    """Where the text of a preference stands: "system" where the chat template has a place for a system prompt, "user":
    in the user's first message, "front": before a prompt of a model without a template."""
    from jinja2 import TemplateError

    if not tokeniser.has_template:
        return "front"
    messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "x"}]
    try:
        return "system" if _PROBE in tokeniser.tokenizer.apply_chat_template(messages, tokenize=False) else "user"
    except (TemplateError, ValueError):
        return "user"

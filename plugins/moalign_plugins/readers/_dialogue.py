"""What readers share of conversations: lists of messages, and where two of them part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from moalign.api import Message

Text = str | tuple[Message, ...]


def messages(value: Sequence[Any], column: str) -> tuple[Message, ...]:
    """Raises ValueError for a message without role or content, or with more than text."""
    return tuple(_message(message, column) for message in value)


def _message(message: Any, column: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"a message of {column} lacks role or content")
    kept = {key: value for key, value in message.items() if value is not None}
    if not all(isinstance(value, str) for value in kept.values()) or "content" not in kept or "role" not in kept:
        raise ValueError(f"a message of {column} holds more than text")
    return kept


def parted(prompt: Text | None, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Text, str, str]:
    """Prompt and the two replies; raises ValueError where they are not one assistant message each.

    A prompt given beside conversations may be repeated in both of them; then the repeated one is taken.
    """
    if isinstance(prompt, tuple):
        repeats = chosen[: len(prompt)] == prompt == rejected[: len(prompt)]
        length = len(prompt) if repeats else 0
    else:
        length = shared(chosen, rejected)
        prompt = chosen[:length] or prompt
        if prompt is None:
            raise ValueError("no column prompt, and chosen and rejected do not begin with the same message")
    return prompt, reply(chosen[length:], "chosen"), reply(rejected[length:], "rejected")


def shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Length of the shared beginning that leaves a rest of both; a space before the responses goes with them."""
    most = min(len(chosen), len(rejected)) - 1
    end = next((i for i in range(most + 1) if chosen[i] != rejected[i]), None)
    if end is None:
        return max(most, 0)
    return end - 1 if end > 0 and chosen[end - 1] == " " else end


def reply(replies: Sequence[Message], what: str) -> str:
    """The text of a completion that is one assistant message. Raises ValueError for anything else."""
    if len(replies) != 1 or replies[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in replies)
        raise ValueError(f"a completion must be one assistant message: {what} has {roles or 'none'}")
    return replies[0]["content"]


def turns(roles: Sequence[str], contents: Sequence[str]) -> tuple[Message, ...]:
    """Messages that begin with the user's and take turns. Raises ValueError where they do not."""
    for place, role in enumerate(roles):
        if role != ("user", "assistant")[place % 2]:
            raise ValueError(f"the turns do not alternate: turn {place + 1} is the {role}'s")
    return tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=True))


def group_of(prompt: Text) -> str:
    """The group of a record whose prompt this is."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)

"""Preference rows as TRL has them: chosen and rejected, with an explicit or implicit prompt, text or conversations.

Columns: ``chosen`` and ``rejected``, each a text or a list of messages; ``prompt``, the same, or absent where chosen
and rejected both begin with it. Optional: ``score_chosen`` and ``score_rejected`` (numbers), and ``objective``, the
name of the objective that judged the pair. Format: https://huggingface.co/docs/trl/dataset_formats
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moalign.api import DataError, Message, Pair, Reader, Record, Refusal, Row

REGISTRATION = {
    "name": "preference",
    "class": "PreferenceRows",
    "summary": "TRL preference rows: prompt, chosen, rejected",
}

Text = str | tuple[Message, ...]


class PreferenceRows(Reader):
    """``objective`` names the objective that judged the pairs of rows without a column ``objective``."""

    objective: str | None = None

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return "chosen" in row and "rejected" in row

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        for file, line, row in rows:
            try:
                objective = self._objective(row, objectives, file, line)
                prompt, chosen, rejected = _split(row)
                scores = (_score(row, "score_chosen"), _score(row, "score_rejected"))
            except ValueError as reason:
                yield Refusal(file, line, str(reason))
                continue
            yield Record(
                prompt=prompt,
                responses=(chosen, rejected),
                scores={} if scores == (None, None) else {objective: scores},
                pairs={objective: (Pair(0, 1),)},
                group=prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True),
                file=file,
                line=line,
            )

    def _objective(self, row: Mapping[str, Any], objectives: Sequence[str], file: str, line: int) -> str:
        named = row.get("objective")
        if named is not None and not isinstance(named, str):
            raise ValueError(f"the column objective is not a name: {named!r}")
        if named:
            if objectives and named not in objectives:
                raise ValueError(f"unknown objective: {named!r}; the configuration has {', '.join(sorted(objectives))}")
            return named
        if self.objective is not None:
            if objectives and self.objective not in objectives:
                reason = f"the reader's objective '{self.objective}' is none of {', '.join(sorted(objectives))}"
                raise DataError(reason, file=file, line=line)
            return self.objective
        if len(objectives) > 1:
            fault = "the row does not say which objective judged it"
            cure = f"add a column objective, or set the reader's objective to one of {', '.join(sorted(objectives))}"
            raise DataError(f"{fault}: {cure}", file=file, line=line)
        return objectives[0] if objectives else "preference"


def _split(row: Mapping[str, Any]) -> tuple[Text, str, str]:
    """Prompt, chosen response, rejected response. Raises ValueError with the reason for a refusal."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    prompt = None if row.get("prompt") is None else _text(row, "prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_texts(prompt, chosen, rejected)
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        return _split_conversations(prompt, chosen, rejected)
    raise ValueError("one of chosen and rejected is text, the other a conversation")


def _split_texts(prompt: Text | None, chosen: str, rejected: str) -> tuple[Text, str, str]:
    if prompt is not None:
        return prompt, chosen, rejected
    end = _shared(chosen, rejected)
    if end == 0:
        raise ValueError("no column prompt, and chosen and rejected do not begin with the same text")
    return chosen[:end], chosen[end:], rejected[end:]


def _split_conversations(
    prompt: Text | None, chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[Text, str, str]:
    """A prompt given beside conversations may be repeated in both of them; then the repeated one is taken."""
    if isinstance(prompt, tuple):
        repeats = chosen[: len(prompt)] == prompt == rejected[: len(prompt)]
        length = len(prompt) if repeats else 0
    else:
        length = _shared(chosen, rejected)
        prompt = chosen[:length] or prompt
        if prompt is None:
            raise ValueError("no column prompt, and chosen and rejected do not begin with the same message")
    return prompt, _reply(chosen[length:], "chosen"), _reply(rejected[length:], "rejected")


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Length of the shared beginning that leaves a rest of both; a space before the responses goes with them."""
    most = min(len(chosen), len(rejected)) - 1
    end = next((i for i in range(most + 1) if chosen[i] != rejected[i]), None)
    if end is None:
        return max(most, 0)
    return end - 1 if end > 0 and chosen[end - 1] == " " else end


def _reply(messages: Sequence[Message], what: str) -> str:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"a completion must be one assistant message: {what} has {roles or 'none'}")
    return messages[0]["content"]


def _text(row: Mapping[str, Any], column: str) -> Text:
    if column not in row:
        raise ValueError(f"no column {column}")
    value = row[column]
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} is neither text nor a list of messages: {type(value).__name__}")
    return tuple(_message(message, column) for message in value)


def _message(message: Any, column: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"a message of {column} lacks role or content")
    kept = {key: value for key, value in message.items() if value is not None}
    if not all(isinstance(value, str) for value in kept.values()) or "content" not in kept or "role" not in kept:
        raise ValueError(f"a message of {column} holds more than text")
    return kept


def _score(row: Mapping[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a")):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column} is not a finite number: {str(value)[:40]!r}")
    return number

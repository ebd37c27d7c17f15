"""Preference rows as TRL has them: chosen and rejected, with an explicit or implicit prompt, text or conversations.

Columns: ``chosen`` and ``rejected``, each a text or a list of messages; ``prompt``, the same, or absent where chosen
and rejected both begin with it. Optional: ``score_chosen`` and ``score_rejected`` (numbers), ``strength`` of the
judgement (a number from 0, which is a tie; 1 where there is none), and ``objective``, the name of the objective that
judged the pair. Format: https://huggingface.co/docs/trl/dataset_formats
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from moalign.api import Pair, Reader, Record, Refusal, Row
from moalign_plugins.readers._dialogue import Text, group_of, messages, parted, shared
from moalign_plugins.readers._fields import number, records
from moalign_plugins.readers._judges import judge_of

REGISTRATION = {
    "name": "preference",
    "class": "PreferenceRows",
    "summary": "TRL preference rows: prompt, chosen, rejected",
}

SCORES = ("score_chosen", "score_rejected")


class PreferenceRows(Reader):
    """``objective`` names the objective that judged the pairs of rows without a column ``objective``."""

    general: ClassVar[bool] = True

    objective: str | None = None

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return "chosen" in row and "rejected" in row

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        def record(row: Mapping[str, Any], file: str, line: int) -> Record:
            objective = judge_of(row, self.objective, objectives, file, line)
            prompt, chosen, rejected = _split(row)
            scores = tuple(number(row.get(column), column) for column in SCORES)
            strength = number(row.get("strength"), "strength", least=0.0)
            return Record(
                prompt=prompt,
                responses=(chosen, rejected),
                scores={} if scores == (None, None) else {objective: scores},
                pairs={objective: (Pair(0, 1, strength=1.0 if strength is None else strength),)},
                group=group_of(prompt),
                file=file,
                line=line,
            )

        return records(rows, record)


def _split(row: Mapping[str, Any]) -> tuple[Text, str, str]:
    """Prompt, chosen response, rejected response. Raises ValueError with the reason for a refusal."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    prompt = None if row.get("prompt") is None else _text(row, "prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_texts(prompt, chosen, rejected)
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        return parted(prompt, chosen, rejected)
    raise ValueError("one of chosen and rejected is text, the other a conversation")


def _split_texts(prompt: Text | None, chosen: str, rejected: str) -> tuple[Text, str, str]:
    if prompt is not None:
        return prompt, chosen, rejected
    end = shared(chosen, rejected)
    if end == 0:
        raise ValueError("no column prompt, and chosen and rejected do not begin with the same text")
    return chosen[:end], chosen[end:], rejected[end:]


def _text(row: Mapping[str, Any], column: str) -> Text:
    if column not in row:
        raise ValueError(f"no column {column}")
    value = row[column]
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} is neither text nor a list of messages: {type(value).__name__}")
    return messages(value, column)

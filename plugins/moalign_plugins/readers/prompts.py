"""Prompts alone: what a policy is asked when it samples its own responses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moalign.api import Reader, Record, Refusal, Row

REGISTRATION = {
    "name": "prompts",
    "class": "Prompts",
    "summary": "prompts alone, for responses that the policy samples",
}


class Prompts(Reader):
    """``column`` holds the prompt: text, or a list of messages. All other columns are left alone."""

    column: str = "prompt"

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return set(row) == {self.column}

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        for file, line, row in rows:
            prompt = row.get(self.column)
            if isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
                group = json.dumps(prompt, sort_keys=True, default=str)
                yield Record(prompt=tuple(prompt), responses=(), group=group, file=file, line=line)
            elif isinstance(prompt, str) and prompt:
                yield Record(prompt=prompt, responses=(), group=prompt, file=file, line=line)
            else:
                yield Refusal(file, line, f"no prompt in column {self.column!r}")

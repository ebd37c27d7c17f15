"""The share of what was asked of a response's form that it has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import model_validator

from moalign.api import Reward, Sample

REGISTRATION = {
    "name": "format",
    "class": "Format",
    "summary": "share of the required sections, in their order, or of the required keys of a JSON object",
}


class Format(Reward):
    """Between 0 and 1: the share of ``sections`` that stand in the response, each after those before it; or of ``keys``
    in the JSON object that the response is, 0 where it is none. No required key: 1 for every JSON object.
    """

    sections: tuple[str, ...] | None = None
    """texts that must occur, such as "<answer>" and "</answer>"; exactly these letters"""
    keys: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Format:
        if (self.sections is None) == (self.keys is None):
            raise ValueError("give either sections or keys")
        if self.sections is not None and not all(self.sections):
            raise ValueError("sections: there must be some, and none of them empty")
        if self.sections == ():
            raise ValueError("sections: there must be at least one")
        return self

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        measure = self._of_keys if self.sections is None else self._of_sections
        return [measure(sample.response) for sample in samples]

    def _of_sections(self, response: str) -> float:
        assert self.sections
        found, place = 0, 0
        for section in self.sections:
            start = response.find(section, place)
            if start >= 0:
                found, place = found + 1, start + len(section)
        return found / len(self.sections)

    def _of_keys(self, response: str) -> float:
        assert self.keys is not None
        parsed = _object(response)
        if parsed is None:
            return 0.0
        return sum(key in parsed for key in self.keys) / len(self.keys) if self.keys else 1.0


def _object(text: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None

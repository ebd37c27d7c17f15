"""Whether the response is the known answer to its prompt."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import field_validator

from moalign.api import DataError, Message, Reward, Sample

REGISTRATION = {
    "name": "exact-answer",
    "class": "ExactAnswer",
    "summary": "one score where the response is the known answer to its prompt, another where not; else it abstains",
}

NUMBER = re.compile(r"[+-]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]+)?")


class ExactAnswer(Reward):
    """``right`` or ``wrong``: the response, or the part of it that ``extract`` finds, against the prompt's answers.

    Both are compared without regard to case, white space and a full stop at the end, in Unicode's form NFKC; two that
    are numbers, as numbers ("1,000.0" is "1000"). Abstains where the file has no answer to the prompt.
    """

    path: str
    """JSONL with ``prompt`` (text or messages) and ``answer`` (text, or a list of texts that are all right)"""
    extract: str | None = None
    """a regular expression with one group, such as "Answer: (.*)"; the last match counts, no match is wrong"""
    right: float = 1.0
    wrong: float = 0.0

    @field_validator("path")
    @classmethod
    def _is_there(cls, path: str) -> str:
        if not Path(path).expanduser().is_file():
            raise ValueError(f"no such file: {path}")
        return path

    @field_validator("extract")
    @classmethod
    def _has_one_group(cls, extract: str | None) -> str | None:
        try:
            if extract is None or re.compile(extract).groups == 1:
                return extract
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        raise ValueError("a regular expression with exactly one group, which is the answer")

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        file = Path(self.path).expanduser()
        known = _answers(file, file.stat().st_mtime_ns)
        return [self._score(sample.response, known.get(_key(sample.prompt))) for sample in samples]

    def _score(self, response: str, answers: frozenset[str] | None) -> float | None:
        if answers is None:
            return None
        if self.extract is not None:
            found = re.findall(self.extract, response)
            if not found:
                return self.wrong
            response = found[-1]
        return self.right if _normalised(response) in answers else self.wrong


@lru_cache(maxsize=8)
def _answers(file: Path, changed: int) -> Mapping[str, frozenset[str]]:
    """By prompt, all its right answers; ``changed`` is when the file was. Raises DataError with file and line."""
    found: dict[str, frozenset[str]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = _key(row["prompt"]), row["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError("a row is a JSON object with prompt and answer", file=str(file), line=number) from None
        answers = [answer] if isinstance(answer, str) else answer
        if not isinstance(answers, list) or not answers or not all(isinstance(each, str) for each in answers):
            raise DataError("answer is a text, or a list of texts", file=str(file), line=number)
        if prompt in found:
            raise DataError("this prompt has an answer already", file=str(file), line=number)
        found[prompt] = frozenset(map(_normalised, answers))
    return found


def _key(prompt: str | Sequence[Message] | Any) -> str:
    return json.dumps(prompt, sort_keys=True, default=dict)


def _normalised(text: str) -> str:
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()
    return _number(words.replace(",", "")) if NUMBER.fullmatch(words) else words


def _number(text: str) -> str:
    """A number in digits, written in one way: no plus, no zeros that say nothing."""
    sign = "-" if text.startswith("-") else ""
    whole, _, fraction = text.lstrip("+-").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    digits = f"{whole}.{fraction}" if fraction else whole
    return digits if digits == "0" else sign + digits

"""QA-FEEDBACK (arXiv:2306.01693): four answers per question, human comparisons, fine-grained errors of the first.

What it offers, each under the name of an objective:
``overall``       the human comparisons; 1: the first is better, 2: the second, 0: a tie
``relevance``     the corrected answer against answer 1, where that had an Irrelevant, Redundant or Incoherent span
``factuality``    the same for Wrong-Grounding and Unverifiable spans
``completeness``  the same where answer 1 left information out
``conciseness``   the shorter of two answers, by characters, with the difference as strength; equal length is a tie
A corrected answer that is empty or equals answer 1 makes a pair all the same, which is counted and dropped later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from pydantic import Field

from moalign.api import DataError, Pair, Reader, Record, Refusal, Row

REGISTRATION = {
    "name": "qa-feedback",
    "class": "QAFeedback",
    "summary": "QA-FEEDBACK: four answers per question, human pairs and fine-grained errors",
    "paper": "arXiv:2306.01693",
}

ANSWERS = ("prediction 1", "prediction 2", "prediction 3", "prediction 4")
COMPARED = tuple(combinations(range(len(ANSWERS)), 2))  # the order of the list ``preference``
CORRECTED = len(ANSWERS)  # index of the corrected answer among the responses
ASPECTS: Mapping[str, frozenset[str]] = {
    "relevance": frozenset({"Irrelevant", "Redundant", "Incoherent"}),
    "factuality": frozenset({"Wrong-Grounding", "Unverifiable"}),
}
OFFERED = ("overall", "relevance", "factuality", "completeness", "conciseness")


class QAFeedback(Reader):
    """``passages``: how many characters of the passages stand before the question, in whole sentences (null: all)."""

    passages: int | None = Field(None, ge=0)

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return {"question", "preference", *ANSWERS} <= row.keys()

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        wanted = [name for name in OFFERED if not objectives or name in objectives]
        for file, line, row in rows:
            if not wanted:
                fault = f"none of the objectives {', '.join(objectives)} is in this file"
                raise DataError(f"{fault}; it offers {', '.join(OFFERED)}", file=file, line=line)
            try:
                yield self._record(row, wanted, file, line)
            except ValueError as reason:
                yield Refusal(file, line, str(reason))

    def _record(self, row: Mapping[str, Any], wanted: Sequence[str], file: str, line: int) -> Record:
        question = _text(row, "question")
        answers = [_text(row, name).strip() for name in ANSWERS]
        pairs: dict[str, tuple[Pair, ...]] = {}
        if "overall" in wanted:
            pairs["overall"] = _compared(row.get("preference"))
        if "conciseness" in wanted:
            pairs["conciseness"] = tuple(_shorter(answers, first, second) for first, second in COMPARED)
        faulty = [name for name in wanted if name in _aspects_in_error(row)] if set(wanted) - pairs.keys() else []
        if faulty:
            answers.append(_text(row["feedback"], "corrected-prediction").strip())
            pairs |= {name: (Pair(CORRECTED, 0),) for name in faulty}
        prompt = self._prompt(question, row.get("passages"))
        return Record(prompt, tuple(answers), pairs=pairs, group=question, file=file, line=line)

    def _prompt(self, question: str, passages: Any) -> str:
        """The passages, then the question; a passage is a title followed by its sentences."""
        texts: list[str] = []
        room = self.passages
        if room != 0:
            for sentences in _passages(passages):
                kept = []
                for sentence in sentences:
                    if room is not None and len(sentence) > room:
                        room = 0
                        break
                    room = None if room is None else room - len(sentence)
                    kept.append(sentence)
                texts.append(" ".join(kept))
        return "\n\n".join([*filter(None, texts), f"Question: {question}\nAnswer:\n"])


def _compared(preference: Any) -> tuple[Pair, ...]:
    if not isinstance(preference, list) or len(preference) != len(COMPARED):
        raise ValueError("preference is not a list of 6 comparisons")
    pairs = []
    for (first, second), verdict in zip(COMPARED, preference, strict=True):
        if type(verdict) is not int or verdict not in (0, 1, 2):
            raise ValueError(f"a comparison is none of 0, 1 and 2: {str(verdict)[:40]!r}")
        pairs.append(Pair(second, first) if verdict == 2 else Pair(first, second, strength=float(verdict)))
    return tuple(pairs)


def _shorter(answers: Sequence[str], first: int, second: int) -> Pair:
    difference = len(answers[second]) - len(answers[first])
    return Pair(first, second, float(difference)) if difference >= 0 else Pair(second, first, float(-difference))


def _aspects_in_error(row: Mapping[str, Any]) -> set[str]:
    feedback = row.get("feedback")
    errors = feedback.get("errors") if isinstance(feedback, dict) else None
    missing = feedback.get("missing-info") if isinstance(feedback, dict) else None
    if not isinstance(errors, list) or not isinstance(missing, list):
        raise ValueError("feedback lacks its lists errors and missing-info")
    kinds = {str(error.get("error type") if isinstance(error, dict) else error) for error in errors}
    unknown = kinds - frozenset().union(*ASPECTS.values())
    if unknown:
        raise ValueError(f"unknown error type: {min(unknown)[:40]!r}")
    found = {name for name, of_aspect in ASPECTS.items() if kinds & of_aspect}
    return found | ({"completeness"} if missing else set())


def _passages(passages: Any) -> list[list[str]]:
    if not isinstance(passages, list):
        raise ValueError("passages is not a list")
    for passage in passages:
        if not isinstance(passage, list) or not all(isinstance(sentence, str) for sentence in passage):
            raise ValueError("a passage is not a list of sentences")
    return [passage[1:] for passage in passages]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name) if isinstance(row, Mapping) else None
    if not isinstance(value, str):
        raise ValueError(f"no text under {name!r}")
    return value

"""RewardBench (arXiv:2403.13787) and RewardBench 2 (arXiv:2506.01937).

RewardBench: ``prompt``, ``chosen``, ``chosen_model``, ``rejected``, ``rejected_model``, ``subset``, ``id``.
RewardBench 2: ``chosen`` and ``rejected`` are lists, with ``num_correct``, ``num_incorrect``, ``subset``, ``id``; every
right answer is better than every wrong one. In the subset "Ties" several answers are right, and tie with each other.

It offers ``preference``, or, with ``by_subset``, an objective for each subset: its name in lower case, blanks as "-".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

from pydantic import Field

from moalign.api import Pair, Reader, Record, Refusal, Row
from moalign_plugins.readers._fields import entries, number, records, text
from moalign_plugins.readers._judges import asked_for, check_named

REGISTRATION = {
    "name": "rewardbench",
    "class": "RewardBench",
    "summary": "RewardBench 1 and 2: right and wrong answers by subset",
    "paper": "arXiv:2403.13787",
}

PREFERENCE, TIES = "preference", "ties"
COUNTS = {"chosen": "num_correct", "rejected": "num_incorrect"}


class RewardBench(Reader):
    """Right and wrong answers; offers ``preference``, or an objective for each subset."""

    by_subset: bool = False
    """an objective for each subset, instead of one for all; a row of another subset than those is refused"""
    names: dict[str, str] = Field(default_factory=dict)
    """objective -> what the file calls it, where the configuration has another name for it"""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        first = {"chosen_model", "rejected_model"} <= row.keys()
        return {"prompt", "subset", "id", *COUNTS} <= row.keys() and (first or {*COUNTS.values()} <= row.keys())

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        def record(row: Mapping[str, Any], file: str, line: int) -> Record:
            subset = "-".join(text(row, "subset").lower().split())
            asked = self._asked(subset, objectives, file, line)
            chosen, rejected = (_answers(row, column) for column in COUNTS)
            right, wrong = range(len(chosen)), range(len(chosen), len(chosen) + len(rejected))
            pairs = [Pair(*pair) for pair in product(right, wrong)]
            pairs += [Pair(*pair, strength=0.0) for pair in combinations(right, 2) if subset == TIES]
            prompt = text(row, "prompt")
            judged = dict.fromkeys(asked, tuple(pairs))
            return Record(prompt, (*chosen, *rejected), pairs=judged, group=prompt, file=file, line=line)

        return records(rows, record)

    def _asked(self, subset: str, objectives: Sequence[str], file: str, line: int) -> list[str]:
        if not self.by_subset:
            return list(asked_for((PREFERENCE,), self.names, objectives, file, line))
        if not subset:
            raise ValueError("the subset has no name")
        check_named(self.names, objectives, file, line)
        called = [name for name, inner in self.names.items() if inner == subset] or [subset]
        asked = [name for name in called if not objectives or name in objectives]
        if not asked:
            raise ValueError(
                f"a subset that is no objective: '{subset}'; the configuration has {', '.join(objectives)}"
            )
        return asked


def _answers(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """One, or the list of RewardBench 2. Text that looks like a list is a list only there."""
    if COUNTS[column] not in row:
        return (text(row, column),)
    answers = entries(row, column)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"not a list of texts: column {column!r}")
    count = number(row[COUNTS[column]], COUNTS[column])
    if count is not None and count != len(answers):
        raise ValueError(f"{COUNTS[column]} differs from the number of answers: {count:g} for {len(answers)}")
    return tuple(answers)

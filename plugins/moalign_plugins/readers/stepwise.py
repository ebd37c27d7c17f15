"""Stepwise supervision, as TRL has it: ``prompt``, ``completions`` (the steps of a solution), ``labels`` (one a step).

So are trl-lib/math_shepherd (arXiv:2312.08935) and trl-lib/prm800k (arXiv:2305.20050). A label is true or false, or a
number from 0 to 1, the probability that the step is right.

A record has no steps, and nothing in moalign trains on single steps: the steps are joined to one response, and their
labels to scores of the whole response. What it offers, each under the name of an objective:
``share``         the mean of the labels
``product``       their product, the probability that all steps are right (arXiv:2305.20050)
``least``         the smallest (arXiv:2312.08935)
``before-error``  the steps before the first wrong one (a label below 1/2), as a share of all
Where a label is missing, none of the scores is known. Solutions to the same prompt become one record later; equal
scores are ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from moalign.api import Message, Reader, Record, Refusal, Row
from moalign_plugins.readers._dialogue import group_of, messages
from moalign_plugins.readers._fields import entries, is_missing, number, records, text
from moalign_plugins.readers._judges import asked_for

REGISTRATION = {
    "name": "stepwise",
    "class": "Stepwise",
    "summary": "solutions with a label for each step, as scores of the whole",
    "paper": "arXiv:2305.20050",
}

COLUMNS = {"prompt", "completions", "labels"}


def _before_error(labels: Sequence[float]) -> float:
    return next((place for place, label in enumerate(labels) if label < 0.5), len(labels)) / len(labels)


OFFERED: Mapping[str, Callable[[Sequence[float]], float]] = {
    "share": lambda labels: math.fsum(labels) / len(labels),
    "product": math.prod,
    "least": min,
    "before-error": _before_error,
}


class Stepwise(Reader):
    """Steps joined to one response; offers ``share``, ``product``, ``least`` and ``before-error`` of their labels."""

    names: dict[str, str] = Field(default_factory=dict)
    """objective -> the score that it is, such as {correct: product}"""
    separator: str = "\n"
    """what stands between the steps of a response"""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return row.keys() >= COLUMNS

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        def record(row: Mapping[str, Any], file: str, line: int) -> Record:
            asked = asked_for(tuple(OFFERED), self.names, objectives, file, line)
            steps = entries(row, "completions")
            if not steps or not all(isinstance(step, str) and step.strip() for step in steps):
                raise ValueError("a step is empty or not text")
            labels = [_label(label) for label in entries(row, "labels")]
            if len(labels) != len(steps):
                raise ValueError(f"number of labels differs from number of steps: {len(labels)} for {len(steps)}")
            known = [label for label in labels if label is not None]
            scores = {
                name: (OFFERED[inner](known) if len(known) == len(steps) else None,) for name, inner in asked.items()
            }
            prompt = _prompt(row)
            response = self.separator.join(steps)
            return Record(prompt, (response,), scores=scores, group=group_of(prompt), file=file, line=line)

        return records(rows, record)


def _label(label: Any) -> float | None:
    if isinstance(label, bool):
        return float(label)
    return None if is_missing(label) else number(label, "labels", 0.0, 1.0)


def _prompt(row: Mapping[str, Any]) -> str | tuple[Message, ...]:
    return messages(row["prompt"], "prompt") if isinstance(row.get("prompt"), list) else text(row, "prompt")

"""PKU-SafeRLHF (arXiv:2406.15513): two responses, judged once for helpfulness and once for harmlessness.

Columns: ``prompt``, ``response_0``, ``response_1``, ``better_response_id``, ``safer_response_id`` and
``is_response_0_safe``, ``is_response_1_safe``. What it offers, each under the name of an objective:
``helpful``   the response of ``better_response_id`` against the other
``harmless``  the response of ``safer_response_id`` against the other; the two judgements may disagree
``safe``      a score: 1 for a response that is labelled safe, 0 for one that is not
Null is not known. There are no ties. Harm categories and severity levels are left alone: map them with ``columns``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from moalign.api import Pair, Reader, Record, Refusal, Row
from moalign_plugins.readers._fields import index, records, text, truth
from moalign_plugins.readers._judges import asked_for

REGISTRATION = {
    "name": "pku-saferlhf",
    "class": "PKUSafeRLHF",
    "summary": "PKU-SafeRLHF: which of two responses is more helpful, and which safer",
    "paper": "arXiv:2406.15513",
}

JUDGEMENTS = {"helpful": "better_response_id", "harmless": "safer_response_id"}
RESPONSES = ("response_0", "response_1")
LABELS = ("is_response_0_safe", "is_response_1_safe")
OFFERED = (*JUDGEMENTS, "safe")


class PKUSafeRLHF(Reader):
    """Two responses, judged twice; offers ``helpful``, ``harmless`` and the score ``safe``."""

    names: dict[str, str] = Field(default_factory=dict)
    """objective -> what the file calls it, where the configuration has another name for it"""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return {"prompt", *RESPONSES, *JUDGEMENTS.values()} <= row.keys()

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        def record(row: Mapping[str, Any], file: str, line: int) -> Record:
            asked = asked_for(OFFERED, self.names, objectives, file, line)
            prompt = text(row, "prompt")
            safe = tuple(truth(row.get(column), column) for column in LABELS)
            judged = {inner: _pair(row, column) for inner, column in JUDGEMENTS.items() if inner in asked.values()}
            _check_labels(judged.get("harmless", ()), safe)
            known = tuple(None if label is None else float(label) for label in safe)
            return Record(
                prompt=prompt,
                responses=tuple(text(row, column) for column in RESPONSES),
                scores={name: known for name, inner in asked.items() if inner == "safe"},
                pairs={name: judged[inner] for name, inner in asked.items() if judged.get(inner)},
                group=prompt,
                file=file,
                line=line,
            )

        return records(rows, record)


def _pair(row: Mapping[str, Any], column: str) -> tuple[Pair, ...]:
    best = index(row.get(column), column, len(RESPONSES))
    return () if best is None else (Pair(best, 1 - best),)


def _check_labels(pairs: Sequence[Pair], safe: Sequence[bool | None]) -> None:
    """The data card: a safe response is always ranked above one that is not."""
    for pair in pairs:
        if safe[pair.chosen] is False and safe[pair.rejected] is True:
            raise ValueError("the safer response is labelled unsafe, and the other one safe")

"""Unpaired preference rows as TRL has them: a prompt, one completion, and whether that is desirable.

Columns: ``prompt`` and ``completion``, each a text or a list of messages; ``label``, true or false, also as 1, 0 or
text. Optional: ``objective``, the name of the objective that the label is for; a response that several judge has a row
for each. Format: https://huggingface.co/docs/trl/dataset_formats
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from moalign.api import Reader, Record, Refusal, Row
from moalign_plugins.readers._dialogue import Text, group_of, messages, reply
from moalign_plugins.readers._fields import records, truth
from moalign_plugins.readers._judges import judge_of

REGISTRATION = {
    "name": "unpaired",
    "class": "UnpairedRows",
    "summary": "TRL unpaired rows: prompt, completion, label, which become scores of 1 and 0",
}


class UnpairedRows(Reader):
    """``objective`` names the objective of the labels of rows without a column ``objective``.

    A label is a score, 1 for true and 0 for false, and unknown where it is missing.
    """

    general: ClassVar[bool] = True

    objective: str | None = None

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return {"prompt", "completion", "label"} <= row.keys()

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        def record(row: Mapping[str, Any], file: str, line: int) -> Record:
            objective = judge_of(row, self.objective, objectives, file, line)
            prompt, completion = _text(row, "prompt"), _text(row, "completion")
            label = truth(row.get("label"), "label")
            return Record(
                prompt=prompt,
                responses=(completion if isinstance(completion, str) else reply(completion, "completion"),),
                scores={objective: (None if label is None else float(label),)},
                group=group_of(prompt),
                file=file,
                line=line,
            )

        return records(rows, record)


def _text(row: Mapping[str, Any], column: str) -> Text:
    value = row.get(column)
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} is neither text nor a list of messages: {type(value).__name__}")
    return messages(value, column)

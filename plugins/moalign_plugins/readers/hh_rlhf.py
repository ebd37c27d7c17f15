r"""HH-RLHF (arXiv:2204.05862): ``chosen`` and ``rejected``, each a whole dialogue as raw text.

A dialogue is ``\n\nHuman: ...\n\nAssistant: ...`` and so on; both begin with the same turns, and the last answer of the
assistant differs. Which objective judged a file is nowhere in it, but in its directory: ``harmless-base`` or
``helpful-base``, ``helpful-online``, ``helpful-rejection-sampled``. A column ``objective``, which you may have added in
order to join several of them, goes before the option ``objective``, and that before the path.

Refused, with the reason: a text that does not begin with a human turn, turns that do not alternate (as where somebody
quotes a dialogue), a last turn that is the human's, and dialogues that part before the last answer: there the two are
answers to different questions. No answers are ties. An empty last answer is left to be counted.
The files are published as .jsonl.gz: unpack them first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moalign.api import Message, Pair, Reader, Record, Refusal, Row
from moalign_plugins.readers._dialogue import Text, group_of, turns
from moalign_plugins.readers._fields import records, text
from moalign_plugins.readers._judges import judge_of

REGISTRATION = {
    "name": "hh-rlhf",
    "class": "HHRLHF",
    "summary": "HH-RLHF: raw dialogues, one objective per directory",
    "paper": "arXiv:2204.05862",
}

TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
DIRECTORY = re.compile(r"(harmless|helpful)-(base|online|rejection-sampled)")
COLUMNS = {"chosen", "rejected"}


class HHRLHF(Reader):
    """Two dialogues that differ in the last answer, judged by one objective."""

    objective: str | None = None
    """the objective that judged the file; null: as its path says"""
    turns: Literal["messages", "text"] = "messages"
    """the prompt as messages, for which the tokenizer needs a chat template, or as the text up to ``Assistant:``"""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        dialogues = (row.get(column) for column in COLUMNS)
        return COLUMNS <= row.keys() <= COLUMNS | {"objective"} and all(
            isinstance(dialogue, str) and dialogue.startswith("\n\nHuman:") for dialogue in dialogues
        )

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        def record(row: Mapping[str, Any], file: str, line: int) -> Record:
            by = "the path's objective" if self.objective is None else "the reader's objective"
            objective = judge_of(row, self.objective or _of_path(file), objectives, file, line, by)
            prompt, chosen, rejected = self._parted(text(row, "chosen"), text(row, "rejected"))
            return Record(
                prompt,
                (chosen, rejected),
                pairs={objective: (Pair(0, 1),)},
                group=group_of(prompt),
                file=file,
                line=line,
            )

        return records(rows, record)

    def _parted(self, chosen: str, rejected: str) -> tuple[Text, str, str]:
        first, second = _dialogue(chosen, "chosen"), _dialogue(rejected, "rejected")
        if first[:-1] != second[:-1]:
            raise ValueError("chosen and rejected part before the last answer")
        if self.turns == "messages":
            stripped = tuple({**message, "content": message["content"].strip()} for message in first)
            return stripped[:-1], stripped[-1]["content"], second[-1]["content"].strip()
        answers = first[-1]["content"], second[-1]["content"]
        return chosen[: len(chosen) - len(answers[0])], *answers


def _dialogue(dialogue: str, column: str) -> tuple[Message, ...]:
    before, *rest = TURN.split(dialogue)
    if before or not rest:
        raise ValueError(f"the text does not begin with a human turn: column {column!r}")
    found = turns([ROLES[name] for name in rest[::2]], rest[1::2])
    if found[-1]["role"] != "assistant":
        raise ValueError(f"the last turn is the human's: column {column!r}")
    return found


def _of_path(file: str) -> str | None:
    """The objective that the nearest directory, or the file's own name, speaks of."""
    found = (DIRECTORY.match(part) for part in reversed(Path(file).parts))
    return next((match[1] for match in found if match), None)

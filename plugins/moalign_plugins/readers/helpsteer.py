"""HelpSteer (arXiv:2311.09528), HelpSteer2 (arXiv:2406.08673, arXiv:2410.01257), HelpSteer3 (arXiv:2505.11475).

Ratings (HelpSteer; HelpSteer2, train and validation): ``prompt``, ``response`` and five attributes from 0 to 4, one
response a row; it offers the attributes. Rows of one prompt become one record later, wherever they stand.

Preference (HelpSteer2, preference): ``prompt``, ``response_1``, ``response_2`` and ``preference_strength``.
Preference (HelpSteer3): ``context`` (messages), ``response1``, ``response2`` and ``overall_preference``.
Both offer ``preference``, from -3 to 3: negative, the first is better; positive, the second; 0 is a tie.

A prompt of several turns in HelpSteer2 is one text with the lines ``<extra_id_1>Assistant`` and ``<extra_id_1>User``
between the turns; it becomes messages. The files are published as .jsonl.gz: unpack them first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from moalign.api import Pair, Reader, Record, Refusal, Row
from moalign_plugins.readers._dialogue import Text, group_of, messages, turns
from moalign_plugins.readers._fields import entries, number, records, signed, spread, text
from moalign_plugins.readers._judges import asked_for

REGISTRATION = {
    "name": "helpsteer",
    "class": "HelpSteer",
    "summary": "HelpSteer 1, 2 and 3: ratings by attribute, and signed preferences",
    "paper": "arXiv:2505.11475",
}

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
PREFERENCE = "preference"
RATING_SCALE, STRONGEST = (0.0, 4.0), 3.0
# signed judgement -> the columns of its two responses
PAIRED: Mapping[str, tuple[str, str]] = {
    "preference_strength": ("response_1", "response_2"),
    "overall_preference": ("response1", "response2"),
}
TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")


class HelpSteer(Reader):
    """Ratings of one response a row, or a signed judgement of two.

    Offers ``helpfulness``, ``correctness``, ``coherence``, ``complexity`` and ``verbosity``, or ``preference``.
    """

    names: dict[str, str] = Field(default_factory=dict)
    """objective -> what the file calls it, where the configuration has another name for it"""
    scale: Literal["file", "10-90"] = "file"
    """10-90: a rating s of 0 to 4 becomes 20 s + 10, as in DPA (arXiv:2402.18571)"""
    turns: Literal["messages", "text"] = "messages"
    """a prompt of several turns: messages, for which the tokenizer needs a chat template, or the text as it stands"""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        first, second = PAIRED["preference_strength"]
        helpsteer2 = {"prompt", first, second, "preference_strength"}
        helpsteer3 = {"context", *PAIRED["overall_preference"], "overall_preference"}
        rated = {"prompt", "response", *ATTRIBUTES}
        return any(columns <= row.keys() for columns in (rated, helpsteer2, helpsteer3))

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        def record(row: Mapping[str, Any], file: str, line: int) -> Record:
            judgement = next((column for column in PAIRED if column in row), None)
            offered = ATTRIBUTES if judgement is None else (PREFERENCE,)
            asked = asked_for(offered, self.names, objectives, file, line, known=(*ATTRIBUTES, PREFERENCE))
            if judgement is None:
                return self._rated(row, asked, file, line)
            return self._compared(row, judgement, asked, file, line)

        return records(rows, record)

    def _rated(self, row: Mapping[str, Any], asked: Mapping[str, str], file: str, line: int) -> Record:
        scores = {name: (self._scaled(number(row.get(inner), inner, *RATING_SCALE)),) for name, inner in asked.items()}
        prompt = self._prompt(row)
        response = text(row, "response")
        return Record(prompt, (response,), scores=scores, group=group_of(prompt), file=file, line=line)

    def _compared(
        self, row: Mapping[str, Any], judgement: str, asked: Mapping[str, str], file: str, line: int
    ) -> Record:
        strength = number(row.get(judgement), judgement, -STRONGEST, STRONGEST)
        pairs: tuple[Pair, ...] = () if strength is None else (signed(strength),)
        prompt = self._prompt(row)
        responses = tuple(text(row, column) for column in PAIRED[judgement])
        judged = dict.fromkeys(asked, pairs) if pairs else {}
        return Record(prompt, responses, pairs=judged, group=group_of(prompt), file=file, line=line)

    def _prompt(self, row: Mapping[str, Any]) -> Text:
        if "context" in row:
            return messages(entries(row, "context"), "context")
        prompt = text(row, "prompt")
        if self.turns == "text" or "<extra_id_1>" not in prompt:
            return prompt
        first, *rest = TURN.split(prompt)
        roles, contents = ["user", *map(str.lower, rest[::2])], [first, *rest[1::2]]
        if any("<extra_id_1>" in content for content in contents):
            raise ValueError("a mark <extra_id_1> in the prompt is not on a line of its own with User or Assistant")
        return turns(roles, contents)

    def _scaled(self, value: float | None) -> float | None:
        return value if self.scale == "file" else spread(value, *RATING_SCALE)

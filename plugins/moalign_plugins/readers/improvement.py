"""Answers that are to be bettered: each becomes a part of the prompt that a policy is asked.

Columns: ``prompt``, ``chosen`` and ``rejected`` with all that the reader `preference` knows; or ``prompt`` and
``response``, one text, or ``responses``, a list of them: what a policy said, as ``moalign generate --json`` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from moalign.api import Pair, Reader, Record, Refusal, Row
from moalign_plugins._improvement import Prompt, Template
from moalign_plugins.readers._dialogue import group_of, messages
from moalign_plugins.readers._fields import entries, text
from moalign_plugins.readers.preference import PreferenceRows

REGISTRATION = {
    "name": "improvement",
    "class": "Improvements",
    "summary": "prompts that hold an answer and ask for a better one (PIT), from preference rows or a policy's answers",
    "paper": "arXiv:2310.00898",
}
LARGER = ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))  # of the gaps g(w, l), g(w, w), g(l, l), g(l, w)


class Improvements(Template, Reader):
    """A preference row becomes the prompt (x, y_l) with both responses and the judgement that y_w is the better one, so
    that `sft` learns y_l -> y_w, losses on pairs the order, and losses on sampled responses ask (x, y_l). Other rows
    become such prompts alone, one for each response. A prompt that holds an answer already, as of the round before, has
    it replaced, so that answers do not pile up. Records of one x are of one group.

    ``gaps`` is for `moalign reward-model train`: a row becomes x with four responses ``{answer}{after}{response}``, y_w
    and y_l in both places, and with the pairs g(y_w, y_l) > g(y_w, y_w), g(y_l, y_l) > g(y_l, y_w), where g(y, y') is
    short for g(x, y, y'), by how much y betters y'. Each > is a logistic term of `bradley-terry`, five in all; the two
    in the middle are not compared with each other.

    PIT, arXiv 2310.00898. The formulas have not been compared with the paper's text.
    """

    general: ClassVar[bool] = True

    objective: str | None = None
    """that judged the pairs of rows without a column ``objective``"""
    better: Literal["rejected", "both"] = "rejected"
    """which response of a preference row is to be bettered. both: the chosen one, too, as a prompt alone, which only
    sampled responses answer"""
    gaps: bool = False
    """comparisons of gaps, in place of prompts that a policy is asked"""

    @model_validator(mode="after")
    def _every_option_does_something(self) -> Improvements:
        if self.gaps and self.better != "rejected":
            raise ValueError("better has no effect with 'gaps: true', which compares both responses in both places")
        return self

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        judged = PreferenceRows(objective=self.objective)
        for file, line, row in rows:
            try:
                if judged.recognises(row):
                    for item in judged.read([(file, line, row)], objectives):
                        yield from [item] if isinstance(item, Refusal) else self._of_pair(item)
                else:
                    yield from self._of_answers(row, file, line)
            except ValueError as reason:
                yield Refusal(file, line, str(reason))

    def _of_pair(self, record: Record) -> list[Record]:
        chosen, rejected = record.responses
        prompt = self._first(record.prompt)
        record = replace(record, group=group_of(prompt))
        if not self.gaps:
            found = [replace(record, prompt=self._asked(prompt, rejected))]
            if self.better == "both":
                found.append(replace(record, prompt=self._asked(prompt, chosen), responses=(), scores={}, pairs={}))
            return found
        responses = [self.compared(ref, y) for y, ref in ((chosen, rejected), (chosen, chosen), (rejected, rejected))]
        ((objective, (pair,)),) = record.pairs.items()
        pairs = tuple(Pair(larger, smaller, pair.strength) for larger, smaller in LARGER)
        responses.append(self.compared(chosen, rejected))
        return [replace(record, prompt=prompt, responses=tuple(responses), scores={}, pairs={objective: pairs})]

    def _of_answers(self, row: Mapping[str, Any], file: str, line: int) -> list[Record]:
        if self.gaps:
            raise ValueError("gaps are of preference rows: no columns chosen and rejected")
        prompt = self._first(_prompt(row))
        several = "responses" in row
        answers = entries(row, "responses") if several else [text(row, "response")]
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError("column 'responses' is no list of texts")
        asked = [self._asked(prompt, answer) for answer in answers]
        return [Record(prompt=each, responses=(), group=group_of(prompt), file=file, line=line) for each in asked]

    def _asked(self, prompt: Prompt, answer: str) -> Prompt:
        if not answer.strip():
            raise ValueError("the answer that is to be bettered is blank")
        return self.asked(prompt, answer)

    def _first(self, prompt: Prompt) -> Prompt:
        """Without the answer that it holds, if it holds one."""
        try:
            return self.taken_apart(prompt)[0]
        except ValueError:
            return prompt


def _prompt(row: Mapping[str, Any]) -> Prompt:
    value = row.get("prompt")
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"prompt is neither text nor a list of messages: {type(value).__name__}")
    return messages(value, "prompt")

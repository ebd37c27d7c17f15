"""Readers that are wrong in one way each; the doc string says which. The last one is unusual, and right."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moalign.api import DataError, Reader, Record, Refusal, Row

ROWS = (
    {"question": "Why is the sky blue?", "answers": ["Air scatters blue light.", "It is not."], "votes": {"up": 3}},
    {"question": "Name a prime.", "answers": ["7"], "votes": {"up": 0}},
)


class Answers(Reader):
    """Right: what the others spoil."""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return "question" in row

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        for file, line, row in rows:
            fault = self.fault(row)
            yield Refusal(file, line, fault) if fault else self.record(row, file, line)

    def fault(self, row: Mapping[str, Any]) -> str:
        answers = row.get("answers")
        if not isinstance(row.get("question"), str):
            return "no question"
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            return "no answers"
        return ""

    def record(self, row: Mapping[str, Any], file: str, line: int) -> Record:
        return Record(row["question"], tuple(row["answers"]), file=file, line=line)


class DropsSilently(Answers):
    """Says nothing about rows that it does not take."""

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        for file, line, row in rows:
            if not self.fault(row):
                yield self.record(row, file, line)


class RaisesKeyError(Answers):
    """Takes every column for granted."""

    def fault(self, row: Mapping[str, Any]) -> str:
        return "" if row["answers"] else "no answers"


class TrustsTheType(Answers):
    """Asks whether there is a text, not whether it is one."""

    def fault(self, row: Mapping[str, Any]) -> str:
        return super().fault(row) or ("" if row.get("votes", {}).get("up", 0) >= 0 else "voted down")


class TakesOutOfTheRow(Answers):
    """Takes the question out of the row."""

    def record(self, row: Mapping[str, Any], file: str, line: int) -> Record:
        return Record(row.pop("question"), tuple(row["answers"]), file=file, line=line)  # type: ignore[attr-defined]


class ReadsItAll(Answers):
    """Reads the whole file before the first record."""

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        yield from list(super().read(rows, objectives))


class CountsFromZero(Answers):
    """Counts lines from 0."""

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        return super().read(((file, line - 1, row) for file, line, row in rows), objectives)


class AnswersWithARow(Answers):
    """Answers with what it found instead of True."""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return row.get("question")  # type: ignore[return-value]


class RecognisesByContent(Answers):
    """Looks into a column that may hold anything, to recognise a row."""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return row["question"].endswith("?")


class Shuffles(Answers):
    """Puts answers in another order every time."""

    def record(self, row: Mapping[str, Any], file: str, line: int) -> Record:
        answers = [f"{answer} {random.SystemRandom().random()}" for answer in row["answers"]]
        return Record(row["question"], tuple(answers), file=file, line=line)


class KeepsLists(Answers):
    """Records with a list where a tuple belongs."""

    def record(self, row: Mapping[str, Any], file: str, line: int) -> Record:
        return Record(row["question"], row["answers"], file=file, line=line)


class ErrorWithoutAPlace(Answers):
    """Says that a row is wrong, and not which."""

    def fault(self, row: Mapping[str, Any]) -> str:
        if super().fault(row):
            raise DataError("a row has no question")
        return ""


class RefusesEverything(Answers):
    """Takes no row."""

    def fault(self, row: Mapping[str, Any]) -> str:
        return "not today"


class NoReason(Answers):
    """Refuses without a reason."""

    def fault(self, row: Mapping[str, Any]) -> str:
        return " " if super().fault(row) else ""


WRONG = {
    DropsSilently: "drop nothing silently",
    RaisesKeyError: "KeyError(.|\n)*yield a Refusal",
    TrustsTheType: r"at \['votes'\](.|\n)*(TypeError|AttributeError)",
    TakesOutOfTheRow: "rows were changed",
    ReadsItAll: "after all 1000 rows",
    CountsFromZero: "file and line of its row",
    AnswersWithARow: "return True or False",
    RecognisesByContent: "answer from the names of the columns",
    Shuffles: "the same rows twice",
    KeepsLists: "a record that cannot be used",
    ErrorWithoutAPlace: "pass file= and line=",
    RefusesEverything: "not today",
    NoReason: "say in the refusal what is wrong",
}


class OneByOne(Answers):
    """Unusual and right: a record for every answer, a refusal for every one that is no text, a row ahead."""

    def recognises(self, row: Mapping[str, Any]) -> bool:
        return False

    def read(self, rows: Iterable[Row], objectives: Sequence[str]) -> Iterator[Record | Refusal]:
        before: list[Record | Refusal] = []
        for row in rows:
            yield from before
            before = list(self.parts(*row))
        yield from before

    def parts(self, file: str, line: int, row: Mapping[str, Any]) -> Iterator[Record | Refusal]:
        answers = row.get("answers")
        question = row.get("question")
        if not isinstance(answers, list) or not isinstance(question, str) or not answers:
            raise DataError("a row without question and answers", file=file, line=line)
        for answer in answers:
            if isinstance(answer, str):
                yield Record(question, (answer,), file=file, line=line)
            else:
                yield Refusal(file, line, f"an answer is not text: {type(answer).__name__}")


UNUSUAL = (Answers, OneByOne)

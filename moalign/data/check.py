"""What a reader understood of a file: counts, ties, conflicts between objectives, lengths, and what was refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from moalign.data.dataset import reward_warnings
from moalign.data.pairing import judgements
from moalign.data.records import merge
from moalign.types import Record, Refusal

if TYPE_CHECKING:
    from rich.console import Group

    from moalign.data.tokenise import Tokeniser

SHOWN = 20  # refusals that are listed one by one; all are counted
QUANTILES: Mapping[str, float] = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "most": 1.0}


@dataclass(frozen=True)
class ObjectiveCounts:
    """What the file says about one objective.

    ``unusable``: pairs of equal responses, or with an empty one; ``contradicted``: their scores say the opposite.
    """

    name: str
    scores: int
    pairs: int
    ties: int
    unusable: int
    contradicted: int


@dataclass(frozen=True)
class Conflict:
    """Pairs of responses that two objectives both judged; ``disagree``: they prefer different ones; ``tied`` in one."""

    objectives: tuple[str, str]
    both: int
    disagree: int
    tied: int


@dataclass(frozen=True)
class Report:
    """``lengths``: what is measured -> quantile -> value. ``refused``: reason -> number."""

    records: int
    groups: int
    responses: int
    empty_responses: int
    objectives: tuple[ObjectiveCounts, ...]
    conflicts: tuple[Conflict, ...]
    lengths: Mapping[str, Mapping[str, float]]
    refused: Mapping[str, int]
    first_refusals: tuple[Refusal, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def examine(
    records: Sequence[Record],
    refusals: Sequence[Refusal] = (),
    objectives: Collection[str] = (),
    *,
    directions: Mapping[str, str] | None = None,
    tokeniser: Tokeniser | None = None,
) -> Report:
    """A report on what was read. ``objectives``: in the order wanted; empty: those that the records name.

    ``directions``: objective -> "max" or "min", for judgements that come from scores.
    """
    names = tuple(objectives) or tuple(sorted({name for r in records for name in (*r.scores, *r.pairs)}))
    signs = {name: -1.0 if (directions or {}).get(name) == "min" else 1.0 for name in names}
    return Report(
        records=len(records),
        groups=len({record.group for record in records}),
        responses=sum(len(record.responses) for record in records),
        empty_responses=sum(not text.strip() for record in records for text in record.responses),
        objectives=tuple(_count(records, name, sign) for name, sign in signs.items()),
        conflicts=_conflicts(merge(records), signs),
        lengths=_lengths(records, tokeniser),
        refused=dict(Counter(refusal.reason.partition(": ")[0] for refusal in refusals).most_common()),
        first_refusals=tuple(refusals[:SHOWN]),
        warnings=_warnings(records, names),
    )


def _count(records: Iterable[Record], name: str, sign: float) -> ObjectiveCounts:
    scores = pairs = ties = unusable = contradicted = 0
    for record in records:
        values = record.scores.get(name, ())
        scores += sum(value is not None for value in values)
        for pair in judgements(record, name, sign):
            pairs += 1
            ties += pair.strength == 0
            texts = {record.responses[pair.chosen].strip(), record.responses[pair.rejected].strip()}
            unusable += len(texts) < 2 or "" in texts
            if values and pair.strength:
                chosen, rejected = values[pair.chosen], values[pair.rejected]
                contradicted += chosen is not None and rejected is not None and sign * (chosen - rejected) < 0
    return ObjectiveCounts(name, scores, pairs, ties, unusable, contradicted)


def _conflicts(records: Iterable[Record], signs: Mapping[str, float]) -> tuple[Conflict, ...]:
    totals: dict[tuple[str, str], Counter[str]] = {pair: Counter() for pair in combinations(signs, 2)}
    for record in records:
        verdicts = {name: _verdicts(record, name, sign) for name, sign in signs.items()}
        for (first, second), total in totals.items():
            for responses in verdicts[first].keys() & verdicts[second].keys():
                one, other = verdicts[first][responses], verdicts[second][responses]
                total["both"] += 1
                total["disagree"] += one * other < 0
                total["tied"] += one * other == 0
    return tuple(Conflict(names, t["both"], t["disagree"], t["tied"]) for names, t in totals.items())


def _verdicts(record: Record, name: str, sign: float) -> dict[tuple[int, int], int]:
    """(i, j) with i < j -> above 0 where i was preferred, below 0 where j was, 0 for a tie or a split vote."""
    verdicts: Counter[tuple[int, int]] = Counter()
    for pair in judgements(record, name, sign):
        first_won = pair.chosen < pair.rejected
        key = (pair.chosen, pair.rejected) if first_won else (pair.rejected, pair.chosen)
        verdicts[key] += 0 if pair.strength == 0 else 1 if first_won else -1
    return dict(verdicts)


def _lengths(records: Sequence[Record], tokeniser: Tokeniser | None) -> dict[str, dict[str, float]]:
    prompts = [r.prompt if isinstance(r.prompt, str) else "".join(m["content"] for m in r.prompt) for r in records]
    measured = {
        "prompt, characters": [len(prompt) for prompt in prompts],
        "response, characters": [len(text) for record in records for text in record.responses],
    }
    if tokeniser is not None:
        measured |= _token_lengths(records, tokeniser)
    return {what: _quantiles(values) for what, values in measured.items() if values}


def _token_lengths(records: Iterable[Record], tokeniser: Tokeniser) -> dict[str, list[int]]:
    from moalign.data.tokenise import encode_record

    sequences = [s for record in records for s in encode_record(tokeniser, record).sequences if s is not None]
    return {
        "prompt, tokens": [sequence.prompt_length for sequence in sequences],
        "response, tokens": [len(sequence.ids) - sequence.prompt_length for sequence in sequences],
        "prompt and response, tokens": [len(sequence.ids) for sequence in sequences],
    }


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    found = np.quantile(values, list(QUANTILES.values()), method="nearest")
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def _warnings(records: Iterable[Record], names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = {id(record): (None,) * len(record.responses) for record in records}
    columns = [[value for r in records for value in r.scores.get(name, unknown[id(r)])] for name in names]
    return reward_warnings(np.array(columns, dtype=np.float64).T, names)  # None becomes NaN


# --- for people -----------------------------------------------------------------------------------------------------


def render(report: Report) -> Group:
    """The report as tables for a rich console."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
        drawn = Table(title=title, title_justify="left")
        for number, column in enumerate(columns):
            drawn.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            drawn.add_row(*(Text(f"{cell:,g}" if isinstance(cell, float) else str(cell)) for cell in row))
        return drawn

    head = f"{report.records:,} records, {report.groups:,} groups (prompts), {report.responses:,} responses"
    empty = f", {report.empty_responses:,} of them empty" if report.empty_responses else ""
    parts: list[Any] = [Text(head + empty)]
    headings = ("objective", "scores", "pairs", "of them ties", "equal or empty", "against their scores")
    counted = [(o.name, o.scores, o.pairs, o.ties, o.unusable, o.contradicted) for o in report.objectives]
    parts.append(table("Objectives", headings, counted))
    conflicts = [(" / ".join(c.objectives), c.both, c.disagree, c.tied) for c in report.conflicts if c.both]
    if conflicts:
        parts.append(table("Conflicts", ("objectives", "pairs judged by both", "disagree", "a tie in one"), conflicts))
    lengths = [(what, *values.values()) for what, values in report.lengths.items()]
    parts.append(table("Lengths", ("", *QUANTILES), lengths))
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    if report.refused:
        total = sum(report.refused.values())
        parts.append(table("Refused", ("reason", "number"), [*report.refused.items(), ("in all", total)]))
        parts += [Text(f"{refusal.file}:{refusal.line}: {refusal.reason}") for refusal in report.first_refusals]
        if total > len(report.first_refusals):
            parts.append(Text(f"... and {total - len(report.first_refusals):,} more"))
    return Group(*parts)

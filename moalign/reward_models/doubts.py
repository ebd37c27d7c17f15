"""Which labels of a preference file its own reward models doubt, each row by the head of its objective.

arXiv 2401.06080; what is made of the differences is said in ``moalign.data.strength``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moalign.api import Reader, Refusal, Row
from moalign.config import PluginChoice
from moalign.data import strength
from moalign.data.loading import choose_reader
from moalign.data.rows import read_rows
from moalign.errors import DataError
from moalign.registry import Registry, discover
from moalign.sweeps.plan import readers_for
from moalign.types import Sample


class Judge(Protocol):
    """What ``moalign.open_reward_model`` returns."""

    @property
    def objectives(self) -> tuple[str, ...]: ...

    def member_scores(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """[K,N,M], NaN where a sample cannot be scored."""
        ...


@dataclass(frozen=True, eq=False)
class Rewritten:
    """``rows[P]``: the rows, from 0, that the treatment is of. ``apart``: how many others, by reason."""

    treatment: strength.Treatment
    rows: NDArray[np.int64]
    apart: Mapping[str, int]


def rewrite(
    judge: Judge,
    source: str | Path,
    target: str | Path,
    flip_share: float = 0.1,
    soft_share: float = 0.3,
    registry: Registry | None = None,
) -> Rewritten:
    """Write the preference rows of ``source`` to the new file ``target``, in their order; every row is kept.

    The difference of a row is that of the head of its column ``objective``, of the only head where it has none. Ties,
    rows of another objective, and rows that cannot be read or scored stay as they are: they are ``apart``. The shares
    are of the other rows of all objectives together, whose heads should have one unit, as log-odds have. Raises as
    ``strength.rewrite`` does, and DataError where no row is left.
    """
    rows = list(read_rows(source))
    reader = _reader(rows, registry or discover())
    apart: Counter[str] = Counter()
    found: list[tuple[int, int, tuple[Sample, Sample]]] = []
    for index, row in enumerate(rows):
        judged = _judged(judge, reader, row)
        if isinstance(judged, str):
            apart[judged] += 1
        else:
            found.append((index, *judged))
    if not found:
        raise DataError(f"no row can be looked at: {dict(apart)}", file=str(source))
    heads = [head for _, head, _ in found]
    chosen, rejected = (judge.member_scores([sides[side] for *_, sides in found]) for side in (0, 1))
    differences = (chosen - rejected)[:, np.arange(len(found)), heads]
    known = np.isfinite(differences).all(0)
    if (~known).any():
        apart["a response that cannot be scored"] += int((~known).sum())
    kept = np.array([index for index, *_ in found], dtype=np.int64)[known]
    measured = strength.measured(differences[:, known])
    return Rewritten(
        strength.rewrite(source, target, measured, flip_share, soft_share, rows=kept.tolist()), kept, dict(apart)
    )


def _reader(rows: Sequence[Row], registry: Registry) -> Reader:
    """The one that recognises the columns that hold a pair, whatever stands beside them."""
    readers = readers_for(PluginChoice(name="auto"), registry)
    for file, line, row in rows:
        columns = {name: row[name] for name in ("prompt", "chosen", "rejected") if name in row}
        if len(columns) > 1:
            return readers[choose_reader((file, line, columns), readers)]
    raise DataError("no row has chosen and rejected", file=rows[0][0] if rows else None)


def _judged(judge: Judge, reader: Reader, row: Row) -> tuple[int, tuple[Sample, Sample]] | str:
    """The head that judged the row's pair, and its two sides; or why it stays apart."""
    named = row[2].get("objective")
    if isinstance(named, str) and named and named not in judge.objectives:
        return "an objective without a head"
    (record,) = reader.read([row], judge.objectives)
    if isinstance(record, Refusal):
        return f"a row that cannot be read: {record.reason}"
    ((objective, (pair,)),) = record.pairs.items()
    if pair.strength == 0:
        return "a tie"
    sides = (
        Sample(record.prompt, record.responses[pair.chosen]),
        Sample(record.prompt, record.responses[pair.rejected]),
    )
    return judge.objectives.index(objective), sides

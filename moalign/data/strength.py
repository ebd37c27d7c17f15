"""How strongly several reward models prefer what the data says is chosen; pairs rewritten by that. arXiv 2401.06080.

Of each pair K reward models, trained on the same data from other seeds, give differences r(chosen) - r(rejected). The
pairs with the lowest mean are likely labelled the wrong way round, those next to them say little, and for the others
the mean says by how much the chosen one is better: flipped labels, smoothed labels, and a margin. ``rewrite`` writes
the first and the last into a file of preference rows, as chosen and rejected and as ``strength``; the reward model
`bradley-terry` does the rest with ``margin: strength``, ``label_smoothing`` and ``smooth_below``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moalign import storage
from moalign.data.rows import read_rows
from moalign.errors import DataError, RunError

LEAST = 1e-6  # strength of a pair whose mean is not positive and whose label stays: 0 would be a tie
SIDES = (("chosen", "rejected"), ("score_chosen", "score_rejected"))


@dataclass(frozen=True, eq=False)
class Strength:
    """``mean[P]`` and ``deviation[P]`` over the K reward models of r(chosen) - r(rejected), divisor K."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Treatment:
    """``flipped[P]``: labels that are turned round. ``strength[P]``: of the judgement after that, above 0.

    ``smooth_below``: a judgement that is weaker says little; it is the option of `bradley-terry`.
    """

    flipped: NDArray[np.bool_]
    strength: NDArray[np.float64]
    smooth_below: float


def measured(differences: ArrayLike) -> Strength:
    """From r(chosen) - r(rejected) [K,P]. Raises DataError where one is not finite or there is none."""
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise DataError(f"differences of K reward models on P pairs are wanted, [K,P]; these are {list(values.shape)}")
    unknown = np.flatnonzero(~np.isfinite(values).all(0))
    if len(unknown):
        raise DataError(f"pair {unknown[0]} (of {len(unknown)}, from 0) has a difference that is not a finite number")
    return Strength(values.mean(0), values.std(0))


def treated(mean: ArrayLike, flip_share: float = 0.1, soft_share: float = 0.3) -> Treatment:
    """By the mean differences [P]. The paper's shares: 0.1 to 0.2 of the labels are wrong.

    Flipped are those among the lowest ``flip_share`` of the pairs that are below 0: where the reward models side with
    the label, nothing speaks for another. With means that are turned round with their labels, the lowest
    ``soft_share`` of all pairs is weak, and every one that is not positive.
    """
    values = np.asarray(mean, dtype=np.float64)
    if not (0 <= flip_share <= 1 and 0 <= soft_share <= 1):
        raise DataError(f"shares are from 0 to 1; flip_share is {flip_share:g}, soft_share {soft_share:g}")
    flipped = (np.argsort(np.argsort(values, kind="stable")) < math.floor(flip_share * len(values))) & (values < 0)
    turned = np.where(flipped, -values, values)
    weak, ordered = math.floor(soft_share * len(values)), np.sort(turned)
    first_hard = ordered[weak] if weak < len(values) else 2 * max(ordered[-1], LEAST)
    above_least = np.nextafter(np.float32(LEAST), np.float32(1))  # training compares float32
    return Treatment(flipped, np.maximum(turned, LEAST), max(float(first_hard), float(above_least)))


def flipped(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same responses, with their scores, the other way round; twice is the row itself."""
    turned = dict(row)
    for one, other in SIDES:
        for here, there in ((one, other), (other, one)):
            turned.pop(here, None)
            if there in row:
                turned[here] = row[there]
    return turned


def rewrite(
    source: str | Path,
    target: str | Path,
    strength: Strength,
    flip_share: float = 0.1,
    soft_share: float = 0.3,
    rows: Iterable[int] | None = None,
) -> Treatment:
    """Write preference rows, in the order of ``source``, to the new JSONL file ``target``; every row is kept.

    Each gets ``strength``, and besides it what it comes from: ``strength_mean``, ``strength_deviation`` and
    ``strength_flipped``. ``rows``: which rows, from 0, the pairs are, in their order (None: all); others are written as
    they are. Raises DataError where rows and pairs do not match, and where a row of a pair has no chosen and rejected
    or has a strength already; RunError where ``target`` exists.
    """
    if Path(target).exists():
        raise RunError(f"{target} exists already; it is never overwritten")
    found = treated(strength.mean, flip_share, soft_share)
    read = list(read_rows(source))
    place = {row: pair for pair, row in enumerate(range(len(read)) if rows is None else rows)}
    if len(place) != len(found.flipped) or not set(place) <= set(range(len(read))):
        part = "" if rows is None else f", {len(place)} of which are asked for"
        fault = f"it has {len(read)} rows{part}, and there are differences of {len(found.flipped)}"
        raise DataError(fault, file=str(source))
    lines = []
    for index, (file, line, row) in enumerate(read):
        written = dict(row)
        if index in place:
            _check_row(row, file, line)
            pair = place[index]
            turned = flipped(row) if found.flipped[pair] else written
            written = turned | {
                "strength": float(found.strength[pair]),
                "strength_mean": float(strength.mean[pair]),
                "strength_deviation": float(strength.deviation[pair]),
                "strength_flipped": bool(found.flipped[pair]),
            }
        lines.append(json.dumps(written, ensure_ascii=False, allow_nan=False) + "\n")
    storage.write_text(target, "".join(lines))
    return found


def _check_row(row: Mapping[str, Any], file: str, line: int) -> None:
    if "chosen" not in row or "rejected" not in row:
        raise DataError("a row without chosen and rejected", file=file, line=line)
    if "strength" in row:
        raise DataError("a row that has a strength already, which would be lost", file=file, line=line)


def counts(treatment: Treatment) -> Mapping[str, int]:
    """How many pairs were flipped, are weak, and have a margin."""
    weak = int((treatment.strength < treatment.smooth_below).sum())
    return {
        "flipped": int(treatment.flipped.sum()),
        "weak": weak,
        "with a margin": len(treatment.strength) - weak,
    }

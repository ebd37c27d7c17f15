"""How the sequences of a step are arranged into forward passes: prompts computed once, and little padding.

What a step trains on is settled before; here it is only cut and laid out, and the sum of the gradients is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Sequence as TokenSequence
from moalign.engine.layout import row_length

OPERATIONS_PER_SECOND = {True: 2e14, False: 1e11}  # by whether it is a GPU; a rule of thumb
Rows = list[list[int]]  # the sequences of each row of the model's input


@dataclass(frozen=True)
class Packing:
    """What a pass costs on this model and device, in positions' worth of its matrix products.

    A transformer layer of width D takes 24 D^2 operations for a position and 4 D for each one it attends to, so that
    attending to 6 D others costs as much as the position itself; causal attention leaves out half.

    ``attention``     cost of one attended position, 1 / (6 D) where attention is as fast as products
    ``overhead``      cost of one more pass
    ``limit``         positions in a pass at most, padding among them; what belongs together is never cut for it
    ``shares``        whether responses to one prompt may lie in one row
    ``longest``       positions in such a row at most (None: any number)
    ``multiple``      rows are padded to a multiple of this
    ``whole``         rows hold the last token of each response too, whose hidden state somebody reads
    """

    attention: float
    overhead: float
    limit: int
    shares: bool = False
    longest: int | None = None
    multiple: int = 1
    whole: bool = False

    def cost(self, rows: float, length: float, alone: bool) -> float:
        """Of ``rows`` rows of ``length`` positions; ``alone``: each row holds one sequence, attention is causal."""
        return rows * length * (1 + length * self.attention * (0.5 if alone else 1.0))


@dataclass(frozen=True)
class Pass:
    """The units of one forward pass, and the rows in which their sequences lie, numbered within the pass."""

    units: tuple[int, ...]
    rows: Rows


def arrange(units: Sequence[Sequence[TokenSequence]], packing: Packing) -> list[Pass]:
    """Cut units (sequences that belong into one pass) into passes of least cost: padding and overhead together.

    Units are sorted by their longest row, and the best cuts of that order are found by dynamic programming. Sequences
    of a pass are numbered unit after unit, in the order of ``Pass.units``. A function of its arguments alone.
    """
    packed = [pack(unit, packing) for unit in units]
    lengths = np.array([_longest(unit, rows, packing) for unit, rows in zip(units, packed, strict=True)])
    order = np.argsort(lengths, kind="stable")
    counts = np.array([len(packed[index]) for index in order])
    passes = []
    for start, end in _cuts(counts, lengths[order], packing):
        chosen = order[start:end].tolist()
        rows: Rows = []
        first = 0
        for index in chosen:
            rows += [[first + member for member in row] for row in packed[index]]
            first += len(units[index])
        named = [sequence for index in chosen for sequence in units[index]]
        passes.append(Pass(tuple(chosen), apart_beyond_window(named, rows, packing)))
    return passes


def apart_beyond_window(sequences: Sequence[TokenSequence], rows: Rows, packing: Packing) -> Rows:
    """The rows of one forward pass; a row for each sequence where one of them is longer than the model's window.

    A row that several sequences share brings a mask for the whole pass, and behind it no row has a window.
    """
    if packing.longest is None or _longest(sequences, rows, packing) <= packing.longest:
        return rows
    return [[member] for row in rows for member in row]


def pack(sequences: Sequence[TokenSequence], packing: Packing) -> Rows:
    """Rows for the sequences of a unit: those with the same prompt share rows as far as that is cheaper."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        by_prompt.setdefault(sequence.prompt, []).append(index)
    return [row for members in by_prompt.values() for row in _split(sequences, members, packing)]


def _split(sequences: Sequence[TokenSequence], members: list[int], packing: Packing) -> Rows:
    """The responses to one prompt, split evenly into the number of rows that costs least."""
    apart = [[index] for index in members]
    if not packing.shares or len(members) == 1:
        return apart
    best, least = apart, sum(packing.cost(1, _longest(sequences, [row], packing), alone=True) for row in apart)
    for number in range(1, len(members)):
        rows = [part.tolist() for part in np.array_split(np.array(members), number)]
        lengths = [_longest(sequences, [row], packing) for row in rows]
        cost = sum(packing.cost(1, length, alone=False) for length in lengths)
        if cost < least and (packing.longest is None or max(lengths) <= packing.longest):
            best, least = rows, cost
    return best


def _longest(sequences: Sequence[TokenSequence], rows: Rows, packing: Packing) -> int:
    return max(row_length([sequences[index] for index in row], packing.whole) for row in rows)


def _cuts(rows: np.ndarray, lengths: np.ndarray, packing: Packing) -> Iterator[tuple[int, int]]:
    """Where the sorted units (numbers of rows, longest row of each) are cut; (start, end) of each pass."""
    before = np.concatenate([[0], np.cumsum(rows)])  # rows before each unit
    least = np.zeros(len(rows) + 1)
    start_of = np.zeros(len(rows) + 1, dtype=np.int64)
    for end in range(1, len(rows) + 1):
        length = -(-int(lengths[end - 1]) // packing.multiple) * packing.multiple
        # passes that begin earlier are too large; one unit alone never is
        first = min(int(np.searchsorted(before, before[end] - packing.limit // length)), end - 1)
        in_pass = before[end] - before[first:end]
        cost = least[first:end] + packing.overhead + np.array(packing.cost(in_pass, length, alone=False))
        start_of[end] = first + int(cost.argmin())
        least[end] = cost[start_of[end] - first]
    cuts = []
    end = len(rows)
    while end:
        cuts.append((int(start_of[end]), end))
        end = int(start_of[end])
    return reversed(cuts)


# --- units ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairPass:
    """Pairs of the dataset (indices [P]), its sequences that they and their views name [N], and their rows."""

    pairs: np.ndarray
    sequences: np.ndarray
    rows: Rows


def pair_passes(dataset: PairDataset, pairs: np.ndarray, packing: Packing) -> list[PairPass]:
    """Passes over pairs of the dataset, with their views; the pairs of one group stay together, each sequence once."""
    group_of = dataset.groups[dataset.pairs[pairs, 0]]
    members: dict[int, list[int]] = {}
    for pair, group in zip(pairs.tolist(), group_of.tolist(), strict=True):
        members.setdefault(group, []).append(pair)
    units = [np.array(group, dtype=np.int64) for group in members.values()]
    named = [_in_order(dataset.rows_of(unit)) for unit in units]
    arranged = arrange([[dataset.sequences[index] for index in names] for names in named], packing)
    return [
        PairPass(
            np.concatenate([units[unit] for unit in each.units]),
            np.array([index for unit in each.units for index in named[unit]], dtype=np.int64),
            each.rows,
        )
        for each in arranged
    ]


def _in_order(values: np.ndarray) -> list[int]:
    """Distinct values in the order in which they first appear."""
    return list(dict.fromkeys(values.tolist()))

"""What the filters by rank share: the responses to each prompt from best to worst, and draws among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moalign.api import Kept, Sampled

if TYPE_CHECKING:
    from torch import Generator, Tensor


def ranked(about: Sampled) -> Iterator[Tensor]:
    """For each prompt the rows of its responses by the signal, the largest first; of equal ones the first sampled."""
    for group in about.groups.unique().tolist():
        rows = (about.groups == group).nonzero().squeeze(1)
        yield rows[about.signal[rows].argsort(descending=True, stable=True)]


def ends(about: Sampled) -> Iterator[tuple[Tensor, int, int]]:
    """For each prompt its ranked rows, and how many of these have the best and the worst signal, all where all do."""
    for rows in ranked(about):
        values = about.signal[rows]
        yield rows, int((values == values[0]).sum()), int((values == values[-1]).sum())


def chosen(about: Sampled, rows: Sequence[int], reason: str) -> Kept:
    kept = about.groups.new_zeros(len(about.groups)).bool()
    kept[list(rows)] = True
    return Kept.where(kept, reason)


def drawn(about: Sampled, shares: Tensor, generator: Generator) -> Kept:
    """As many draws with replacement from the responses to each prompt as these are, by ``shares`` [N], which need not
    sum to 1; how often a response is drawn is its weight. One that has no share is never drawn."""
    counts = shares.new_zeros(len(shares))
    for rows in ranked(about):
        draws = rows[shares[rows].multinomial(len(rows), replacement=True, generator=generator)]
        counts.index_add_(0, draws, shares.new_ones(len(draws)))
    both = zip(counts.tolist(), shares.tolist(), strict=True)
    reasons = ("" if count else "not drawn" if share else "between" for count, share in both)
    return Kept(counts, tuple(reasons))

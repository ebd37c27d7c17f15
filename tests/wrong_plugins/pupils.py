"""Losses of second adapters that those of `token_objectives` have trained: the first is right, the others are not."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moalign.api import Batch, Objective, PairTerms, log_ratios


class Taught(Objective):
    """Learns to give likelier responses a larger reward; the loss of a companion."""

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "reference"})
    shiftable: ClassVar[bool] = False

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return (log_ratios(batch) - (batch.known["targets"] * batch.mask).sum(-1)) ** 2


class TaughtByAll(Taught):
    """One loss for all responses."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms).mean()


class TaughtEverywhere(Taught):
    """Reads what stands where there is no token."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms) + batch.logps.sum(-1)


class TaughtAtTheBegin(Taught):
    """Takes the first column for that of the first token."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return (log_ratios(batch) - batch.known["targets"][:, 0]) ** 2


class TaughtOfPairs(Taught):
    """Wants pairs."""

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

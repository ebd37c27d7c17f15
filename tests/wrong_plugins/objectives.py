"""Losses that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

import random
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from moalign.api import (
    Batch,
    Objective,
    PairTerms,
    chosen_logps,
    log_ratios,
    pair_log_ratios,
    pair_logits,
)

REFERENCE = frozenset({"pairs", "reference"})


class Logistic(Objective):
    """Right: what the others spoil."""

    needs: ClassVar[frozenset[str]] = REFERENCE
    beta: float = 0.1

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return -logsigmoid(pair_logits(batch, terms, self.beta))


class Reduced(Logistic):
    """Reduces over the pairs."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms).mean()


class KeepsADimension(Logistic):
    """Returns [P,1]."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms)[:, None]


class SqueezesASinglePair(Logistic):
    """Of a single pair makes a number without a dimension."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms).squeeze()


class DoublePrecision(Logistic):
    """Returns float64 for float32."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms).double()


class Detached(Logistic):
    """Has no gradient."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms).detach()


class WrongSlope(Logistic):
    """Detaches a factor, so that the gradient is not that of the value."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        losses = super().loss(batch, terms)
        return losses * losses.detach()


class DetachesNothing(Logistic):
    """Says that it detaches a part, and detaches none."""

    detaches: ClassVar[bool] = True


class ForgetsTheMask(Logistic):
    """Sums over padding too, where logps are 0, but not their gradients."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        assert batch.ref_logps is not None
        ratios = (batch.logps - batch.ref_logps).sum(-1)
        difference = ratios[batch.pairs[:, 0]] - ratios[batch.pairs[:, 1]]
        return -logsigmoid(terms.scale * self.beta * difference - terms.margin)


class MeanOverTheWidth(Logistic):
    """Averages over all columns, padding among them."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        ratios = log_ratios(batch) / batch.mask.shape[1]
        difference = ratios[batch.pairs[:, 0]] - ratios[batch.pairs[:, 1]]
        return -logsigmoid(terms.scale * self.beta * difference - terms.margin)


class DividesByNoTokens(Logistic):
    """Divides by the number of tokens of a row that has none."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        ratios = log_ratios(batch) / batch.mask.sum(-1)
        difference = ratios[batch.pairs[:, 0]] - ratios[batch.pairs[:, 1]]
        return -logsigmoid(terms.scale * self.beta * difference - terms.margin)


class SteepAtTheReference(Logistic):
    """A root, whose slope is infinite where policy and reference agree."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        distance = pair_log_ratios(batch).abs().sqrt()
        return super().loss(batch, terms) + 0.01 * distance


class LogarithmOfTheRatio(Logistic):
    """Not a number for the pairs whose log-ratio is negative."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return -pair_logits(batch, terms, self.beta).log()


class WritesIntoItsInputs(Logistic):
    """Normalises the strengths in place."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        batch.strength.div_(batch.strength.max())
        return super().loss(batch, terms)


class WritesIntoTheTerms(Logistic):
    """Clamps the margin in place."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        terms.margin.add_(1.0)
        return super().loss(batch, terms)


class SeedsTheWorld(Logistic):
    """Seeds torch's global generator."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        torch.manual_seed(0)
        return super().loss(batch, terms)


class DrawsFromTheWorld(Logistic):
    """Draws from the global generator of ``random``."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms) * (0 * random.random() + 1)


class Noisy(Logistic):
    """Adds noise of a generator without a seed."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms) * (1 + random.SystemRandom().random())


class LooksAtNeighbours(Logistic):
    """Centres over the batch."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        losses = super().loss(batch, terms)
        return losses - 0.5 * losses.mean()


class CountsPlaces(Logistic):
    """Weighs a pair by its place in the batch."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms) * torch.arange(1, len(batch.pairs) + 1).to(batch.logps)


class TakesRowsInTurn(Logistic):
    """Takes each prompt's rows by their position."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        extra = (batch.logps * batch.mask).sum(-1)[: len(batch.pairs)]
        return super().loss(batch, terms) - 0.01 * extra


class ReadsTheReference(Logistic):
    """Reads the reference without declaring it."""

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})


class ReadsMarginsWhereTheyAre(Logistic):
    """Reads margins where a combiner happens to have them supplied."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        losses = super().loss(batch, terms)
        return losses if batch.margins is None else losses * batch.margins[:, 0].abs()


class NeverReadsTheReference(Objective):
    """Declares a reference that it has no use for."""

    needs: ClassVar[frozenset[str]] = REFERENCE
    shiftable: ClassVar[bool] = False

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return -chosen_logps(batch, mean=False)


class NeverReadsTheMargins(Logistic):
    """Declares margins that it has no use for."""

    needs: ClassVar[frozenset[str]] = frozenset({"margins", "reference"})


class IgnoresTheLabels(Objective):
    """Declares labelled pairs, but does not care which response is the better one."""

    needs: ClassVar[frozenset[str]] = REFERENCE
    shiftable: ClassVar[bool] = False

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return pair_log_ratios(batch) ** 2


class UnknownNeed(Logistic):
    """Needs what no engine supplies."""

    needs: ClassVar[frozenset[str]] = REFERENCE | {"value_head"}


class NotShiftable(Logistic):
    """Says that it is shiftable, and has no place for scale and margin."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return -logsigmoid(self.beta * pair_log_ratios(batch))


class ForgetsTheScale(Logistic):
    """Reads the margin and not the scale."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return -logsigmoid(self.beta * pair_log_ratios(batch) - terms.margin)


class SecretlyShiftable(Logistic):
    """Says that it is not shiftable, and is."""

    shiftable: ClassVar[bool] = False


class WeighsTwice(Logistic):
    """Applies the weight that the engine applies."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms) * terms.weight


class PaysToLeave(Logistic):
    """Has a price of KL below 0."""

    def kl_price(self) -> float:
        return -0.1


WRONG = {
    PaysToLeave: "a finite number, not below 0",
    Reduced: "reduce over tokens, never over pairs",
    KeepsADimension: r"\[9, 1\]",
    SqueezesASinglePair: "a single pair, 1 pairs",
    DoublePrecision: "losses of torch.float64",
    Detached: "without a graph",
    WrongSlope: "gradcheck",
    DetachesNothing: "though detaches is True",
    ForgetsTheMask: "gradient outside the mask",
    MeanOverTheWidth: "three more columns of padding",
    DividesByNoTokens: "that row has no response tokens",
    SteepAtTheReference: "as at step 0(.|\n)*gradient that is not finite",
    LogarithmOfTheRatio: "loss of pair .* is not finite",
    WritesIntoItsInputs: "strength changed during the call",
    WritesIntoTheTerms: r"terms\.margin changed during the call",
    SeedsTheWorld: "global random state of torch",
    DrawsFromTheWorld: "global random state of random",
    Noisy: "the same batch and terms twice",
    LooksAtNeighbours: "take no statistics over the batch",
    CountsPlaces: "pairs of the batch in another order",
    TakesRowsInTurn: "rows of the batch in another order|a single pair",
    ReadsTheReference: 'declare "reference" in `needs`',
    ReadsMarginsWhereTheyAre: 'declare "margins" in `needs`, or do not read it',
    NeverReadsTheReference: 'take "reference" out of `needs`',
    NeverReadsTheMargins: 'take "margins" out of `needs`',
    IgnoresTheLabels: 'take "pairs" out of `needs`',
    UnknownNeed: "value_head",
    NotShiftable: "though shiftable is True",
    ForgetsTheScale: r"another terms\.scale",
    SecretlyShiftable: "though shiftable is False",
    WeighsTwice: "leave terms.weight alone",
}


class BestOfThePrompt(Objective):
    """Unusual and right: a softmax over the responses of each prompt, whose scores it reads; no reference, no shift."""

    needs: ClassVar[frozenset[str]] = frozenset({"margins"})
    shiftable: ClassVar[bool] = False

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        assert batch.rewards is not None
        totals = (batch.logps * batch.mask).sum(-1) / batch.mask.sum(-1).clamp(min=1)
        same = batch.groups[batch.pairs[:, 0]][:, None] == batch.groups
        policy = totals.expand(len(same), -1).masked_fill(~same, -torch.inf).log_softmax(-1)
        wanted = (batch.rewards * batch.preference).sum(-1).expand(len(same), -1)
        target = wanted.masked_fill(~same, -torch.inf).softmax(-1)
        return -(target * policy.masked_fill(~same, 0.0)).sum(-1)


class StrengthAsOffset(Objective):
    """Unusual and right: softplus of a logit that the strength of the judgement shifts, and no reference."""

    needs: ClassVar[frozenset[str]] = frozenset({"pairs"})

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        totals = (batch.logps * batch.mask).sum(-1)
        difference = totals[batch.pairs[:, 0]] - totals[batch.pairs[:, 1]]
        return softplus(batch.strength.log1p() + terms.margin - terms.scale * difference)


class HeldWeight(Logistic):
    """Unusual and right: a weight is detached, and it says so."""

    detaches: ClassVar[bool] = True

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms) * (-pair_logits(batch, terms, self.beta)).sigmoid().detach()


UNUSUAL = (Logistic, BestOfThePrompt, StrengthAsOffset, HeldWeight)

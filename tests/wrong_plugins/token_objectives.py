"""Losses that weigh the tokens of sampled responses, wrong in one way each; the doc string says which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Generator, Tensor
from wrong_plugins.pupils import Taught, TaughtAtTheBegin, TaughtByAll, TaughtEverywhere, TaughtOfPairs

from moalign.api import Batch, Objective, PairTerms, TokenAdvantages, Tokens


class Baseline(Objective):
    """Right: a reward less a learned baseline, for each token; what those below spoil."""

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "hidden", "token_advantages"})
    shiftable: ClassVar[bool] = False

    def parameters(self, width: int, generator: Generator) -> Mapping[str, Tensor]:
        return {"weight": torch.rand(width, generator=generator)}

    def values(self, batch: Batch) -> Tensor:
        assert batch.hidden is not None
        return batch.hidden.detach() @ batch.parameters["weight"]

    def measure(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"values": self.values(batch)}

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        targets = signal[:, None] * tokens.mask
        return TokenAdvantages(targets - tokens.measured["values"], {"targets": targets})

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        error = (self.values(batch) - batch.known["targets"]) ** 2
        return ((error - batch.logps * cast("Tensor", batch.token_advantages)) * batch.mask).sum(-1)


class ListensToAGuide(Baseline):
    """Right: a token of which the guide is surer counts more."""

    guide: str = "a/folder"

    def guides(self) -> Mapping[str, str]:
        return {"guide": self.guide}

    def measure(self, batch: Batch) -> Mapping[str, Tensor]:
        return {**super().measure(batch), "guide": batch.guides["guide"]}

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        given = super().token_advantages(signal, groups, tokens)
        return replace(given, advantages=given.advantages + 0.1 * tokens.measured["guide"])


class NeverListens(ListensToAGuide):
    """Measures a guide that it has no use for."""

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        return Baseline.token_advantages(self, signal, groups, tokens)


class CountsDigits(Baseline):
    """Right: digits count twice, by an expression that is an option."""

    digits: str = "[0-9]+"

    def passages(self) -> Mapping[str, str]:
        return {"digits": self.digits}

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        given = super().token_advantages(signal, groups, tokens)
        return replace(given, advantages=given.advantages * (1 + (tokens.passages["digits"] > 0)))


class CountsAllAlike(CountsDigits):
    """Has digits looked for, and has no use for them."""

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        return Baseline.token_advantages(self, signal, groups, tokens)


class NoExpression(CountsDigits):
    """Takes any text for an expression."""

    digits: str = "[0-9"


class Teaches(Baseline):
    """Right: a token of which its companion is surer counts more."""

    pupil: ClassVar[type[Objective]] = Taught

    def companion(self) -> Objective:
        return self.pupil()

    def measure(self, batch: Batch) -> Mapping[str, Tensor]:
        return {**super().measure(batch), "companion": batch.guides["companion"]}

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        given = super().token_advantages(signal, groups, tokens)
        return replace(given, advantages=given.advantages + 0.1 * tokens.measured["companion"])


class TeachesInVain(Teaches):
    """Has a second adapter trained, and never asks what it says."""

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        return Baseline.token_advantages(self, signal, groups, tokens)


class TeachesOneForAll(Teaches):
    """Its companion reduces."""

    pupil: ClassVar[type[Objective]] = TaughtByAll


class TeachesEverywhere(Teaches):
    """Its companion learns from padding."""

    pupil: ClassVar[type[Objective]] = TaughtEverywhere


class TeachesFromTheBegin(Teaches):
    """Its companion reads a column that need not be a token's."""

    pupil: ClassVar[type[Objective]] = TaughtAtTheBegin


class TeachesPairs(Teaches):
    """Its companion learns from pairs that nobody has."""

    pupil: ClassVar[type[Objective]] = TaughtOfPairs


class TeachesNothing(Teaches):
    """Its companion is a name."""

    def companion(self) -> Objective:
        return "pupil"  # type: ignore[return-value]


class TokensOfPairs(Baseline):
    """Wants an advantage for each token of the responses of a file."""

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "hidden", "token_advantages"})


class BareAdvantages(Baseline):
    """Returns a tensor."""

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        return cast("TokenAdvantages", super().token_advantages(signal, groups, tokens).advantages)


class TargetsOfResponses(Baseline):
    """Lets the loss know one number per response."""

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        return TokenAdvantages(super().token_advantages(signal, groups, tokens).advantages, {"targets": signal})


class WritesIntoTheMask(Baseline):
    """Weighs the mask in place."""

    def token_advantages(self, signal: Tensor, groups: Tensor, tokens: Tokens) -> TokenAdvantages:
        tokens.mask.mul_(0.5)
        return super().token_advantages(signal, groups, tokens)


class MeasuresResponses(Baseline):
    """Measures one value per response."""

    def measure(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"values": self.values(batch).mean(-1)}


class HidesTheHidden(Baseline):
    """Reads hidden states without declaring them."""

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "token_advantages"})


class NeverReadsTheHidden(Baseline):
    """Declares hidden states that it has no use for."""

    def values(self, batch: Batch) -> Tensor:
        return batch.mask * batch.parameters["weight"].sum()


class LucksOut(Baseline):
    """Draws its first values from no generator that anybody seeded."""

    def parameters(self, width: int, generator: Generator) -> Mapping[str, Tensor]:
        unseeded = torch.Generator()
        unseeded.seed()
        return {"weight": torch.rand(width, generator=unseeded)}


class DoublePrecision(Baseline):
    """Owns float64."""

    def parameters(self, width: int, generator: Generator) -> Mapping[str, Tensor]:
        return {"weight": torch.zeros(width, dtype=torch.float64)}


class Backwards(Baseline):
    """Learns at a negative rate."""

    def lr_factor(self, name: str) -> float:
        return -1.0


class Idle(Baseline):
    """Owns a parameter that it never reads."""

    def parameters(self, width: int, generator: Generator) -> Mapping[str, Tensor]:
        return {**super().parameters(width, generator), "bias": torch.zeros(1)}


class WritesIntoParameters(Baseline):
    """Keeps its weights short, on the side."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        batch.parameters["weight"].detach().mul_(0.99)
        return super().loss(batch, terms)


WRONG = {
    NeverListens: r"use what `measure` finds in batch\.guides",
    CountsAllAlike: r"use tokens\.passages",
    NoExpression: r"'digits' is '\[0-9'",
    TeachesInVain: r"under 'companion' where the round is measured",
    TeachesOneForAll: r"return one loss per response, \[N\]",
    TeachesEverywhere: "a gradient outside the mask",
    TeachesFromTheBegin: r"find a response's tokens by batch\.mask",
    TeachesPairs: r"it needs \['pairs'\]",
    TeachesNothing: r"return a moalign\.api\.Objective",
    TokensOfPairs: 'declare "groups" too: only tokens',
    BareAdvantages: "return a moalign.api.TokenAdvantages",
    TargetsOfResponses: r"targets of torch.float64 \[9\]",
    WritesIntoTheMask: "tokens changed during the call",
    MeasuresResponses: r"'values', torch.float64 \[9\]",
    HidesTheHidden: "let `measure` read what `needs` declares",
    NeverReadsTheHidden: 'take "hidden" out',
    LucksOut: "draw from the generator that is handed over",
    DoublePrecision: r"'weight': torch.float64 \[4\]",
    Backwards: r"lr_factor\('weight'\)",
    Idle: "none for 'bias'",
    WritesIntoParameters: "parameters changed during the call",
}
UNUSUAL = (Baseline, ListensToAGuide, CountsDigits, Teaches)

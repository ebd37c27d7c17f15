"""Losses on sampled responses that are wrong in one way each; the doc string says which. The first one is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor

from moalign.api import Batch, Objective, PairTerms


class Sampled(Objective):
    """Right: takes responses one by one, each against the mean of its prompt's; what those below spoil."""

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "reference"})
    shiftable: ClassVar[bool] = False

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        rewards = signal if log_ratios is None else signal - 0.1 * log_ratios
        same = (groups[:, None] == groups).to(rewards)
        return rewards - same @ rewards / same.sum(-1)

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        assert batch.advantages is not None
        return -(batch.logps * batch.mask).sum(-1) * batch.advantages


class GroupsAndPairs(Sampled):
    """Wants labelled pairs of sampled responses, which nobody labels."""

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "pairs"})


class OldPairs(Sampled):
    """Wants to know who sampled the responses of a file."""

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "old_logps"})


class ReadsTheOld(Sampled):
    """Reads old log-probabilities without declaring them."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        old = cast("Tensor", batch.old_logps)
        return super().loss(batch, terms) * (batch.logps - old).detach().sum(-1).exp()


class NeverReadsTheOld(Sampled):
    """Declares old log-probabilities that it has no use for."""

    needs: ClassVar[frozenset[str]] = frozenset({"groups", "old_logps"})


class Curious(Sampled):
    """Right: is paid for entropy where an option says so."""

    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"bonus": frozenset({"entropy"})}
    bonus: float = 0.1

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms) - self.bonus * self.entropy(batch)

    def entropy(self, batch: Batch) -> Tensor:
        assert batch.entropy is not None
        return batch.entropy.sum(-1)


class Indifferent(Curious):
    """Declares an entropy that it has no use for."""

    def entropy(self, batch: Batch) -> Tensor:
        return 0 * super().entropy(batch)


class DetachesTheEntropy(Curious):
    """Pays for entropy without teaching it."""

    def entropy(self, batch: Batch) -> Tensor:
        return super().entropy(batch).detach()


class NamesNoOption(Curious):
    """Declares what an option needs that it does not have."""

    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"bonuss": frozenset({"entropy"})}


class AsksForMore(Curious):
    """Declares what nobody supplies."""

    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"bonus": frozenset({"entropies"})}


class HasNoUseForRewards(Sampled):
    """Raises the probability of all responses alike."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return -(batch.logps * batch.mask).sum(-1)


class RowsInTurn(Sampled):
    """Weighs a response by its place in the batch."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        return super().loss(batch, terms) * torch.arange(1, len(batch.logps) + 1).to(batch.logps)


class SinglePrecision(Sampled):
    """Makes advantages in float32."""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return super().advantages(signal, groups, log_ratios).float()


class DividesByNoSpread(Sampled):
    """Divides by a spread that is 0 where all rewards are equal."""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        centred = super().advantages(signal, groups, log_ratios)
        return centred / (signal.max() - signal.min())


class WritesIntoTheSignal(Sampled):
    """Centres in place."""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return super().advantages(signal.sub_(signal.mean()), groups, log_ratios)


class InThrees(Sampled):
    """Takes three responses that stand side by side for those to one prompt."""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return super().advantages(signal, torch.arange(len(signal)) // 3, log_ratios)


class ComparesPrompts(Sampled):
    """Takes the mean over all responses of the round."""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return super().advantages(signal, torch.zeros_like(groups), log_ratios)


class UpsideDown(Sampled):
    """Makes better responses less likely."""

    def advantages(self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None) -> Tensor:
        return -super().advantages(signal, groups, log_ratios)


class PassagesOfResponses(Sampled):
    """Weighs responses, and names a passage of them."""

    def passages(self) -> Mapping[str, str]:
        return {"digits": "[0-9]+"}


class Greedy(Sampled):
    """Right: compares with the greedy response."""

    needs: ClassVar[frozenset[str]] = Sampled.needs | {"greedy"}

    def advantages(
        self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None, greedy: Tensor | None = None
    ) -> Tensor:
        assert greedy is not None and log_ratios is not None
        return signal - 0.1 * log_ratios - greedy


class GreedyPairs(Sampled):
    """Wants greedy responses beside those of a file."""

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "greedy"})


class HasNoUseForTheGreedy(Greedy):
    """Has the greedy responses sampled and scored, and compares with none."""

    def advantages(
        self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None, greedy: Tensor | None = None
    ) -> Tensor:
        return Sampled.advantages(self, signal, groups, log_ratios)


class OneGreedyForAll(Greedy):
    """Compares with the mean of all greedy responses."""

    def advantages(
        self, signal: Tensor, groups: Tensor, log_ratios: Tensor | None, greedy: Tensor | None = None
    ) -> Tensor:
        assert greedy is not None
        return super().advantages(signal, groups, log_ratios, greedy.mean().expand_as(greedy))


class TakesNoGreedy(Sampled):
    """Declares greedy responses and has no argument for them."""

    needs: ClassVar[frozenset[str]] = Sampled.needs | {"greedy"}


WRONG = {
    PassagesOfResponses: "only `token_advantages` is told of passages",
    GroupsAndPairs: "without the others",
    OldPairs: 'declare "groups" too',
    ReadsTheOld: 'declare "old_logps" in `needs`',
    NeverReadsTheOld: 'take "old_logps" out',
    Indifferent: 'take "entropy" out',
    DetachesTheEntropy: "no detach",
    NamesNoOption: r"needs_with has \['bonuss'\]",
    AsksForMore: r"needs has \['entropies'\]",
    HasNoUseForRewards: 'take "groups" out',
    RowsInTurn: "responses of the batch in another order",
    SinglePrecision: "advantages of torch.float32",
    DividesByNoSpread: "the advantage of response .* is not finite",
    WritesIntoTheSignal: "signal changed during the call",
    InThrees: "find the responses to one prompt through groups",
    ComparesPrompts: "take means and deviations over the responses to one prompt",
    UpsideDown: "let the advantage grow with the reward",
    GreedyPairs: 'declare "groups" too: greedy',
    HasNoUseForTheGreedy: 'take "greedy" out of `needs`',
    OneGreedyForAll: "the greedy one to its own prompt",
    TakesNoGreedy: "advantages must be found",
}

UNUSUAL = (Sampled, Curious, Greedy)

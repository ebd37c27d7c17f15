"""Reward models that are wrong in one way each; the doc string says which. The last ones are unusual, and right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor
from torch.nn.functional import logsigmoid

from moalign.api import Batch, RewardModel


class Compared(RewardModel):
    """Right: what those that learn from pairs spoil; a linear head, the loss of Bradley and Terry."""

    def parameters(self, width: int, objectives: tuple[str, ...], generator: torch.Generator) -> Mapping[str, Any]:
        return {"head": torch.randn((len(objectives), width), generator=generator) / width**0.5}

    def scores(self, batch: Batch) -> Any:
        assert batch.final is not None
        return batch.final @ batch.parameters["head"].T

    def differences(self, batch: Batch) -> Tensor:
        """Of the scores of a pair, by the objective that judged it; [P]."""
        scores = Compared.scores(self, batch)
        both = scores[batch.pairs[:, 0]] - scores[batch.pairs[:, 1]]
        return both.gather(1, batch.pair_objective[:, None])[:, 0]

    def loss(self, batch: Batch) -> Any:
        return -logsigmoid(self.differences(batch))

    def head(self, parameters: Mapping[str, Tensor]) -> Any:
        return parameters["head"]


class Clairvoyant(Compared):
    """Wants what there is not."""

    needs: ClassVar[frozenset[str]] = frozenset({"final", "pairs", "future"})


class WithoutLabels(Compared):
    """Names nothing to learn from."""

    needs: ClassVar[frozenset[str]] = frozenset({"final"})


class OnlyTheBase(Compared):
    """Wants the base's log-probabilities and none to compare with them."""

    needs: ClassVar[frozenset[str]] = frozenset({"final", "pairs", "reference"})


class HalfPrecision(Compared):
    """Has first values in bfloat16."""

    def parameters(self, width: int, objectives: tuple[str, ...], generator: torch.Generator) -> Mapping[str, Any]:
        return {name: each.bfloat16() for name, each in super().parameters(width, objectives, generator).items()}


class FromTheWorld(Compared):
    """Draws first values from torch's own generator."""

    def parameters(self, width: int, objectives: tuple[str, ...], generator: torch.Generator) -> Mapping[str, Any]:
        return {"head": torch.randn(len(objectives), width)}


class ReadsRewards(Compared):
    """Reads rewards that it did not ask for."""

    def loss(self, batch: Batch) -> Any:
        return super().loss(batch) * (1 + batch.rewards[batch.pairs[:, 0]].nan_to_num().mean(-1))  # type: ignore[index]


class ReadsContextWhereItIs(Compared):
    """Reads the prompt's state where it happens to be there."""

    def loss(self, batch: Batch) -> Any:
        losses = super().loss(batch)
        return losses if batch.context is None else losses + batch.context[batch.pairs[:, 0]].mean(-1)


class Reduced(Compared):
    """Reduces over the pairs."""

    def loss(self, batch: Batch) -> Any:
        return super().loss(batch).mean()


class DoubleLoss(Compared):
    """Returns float64 for float32."""

    def loss(self, batch: Batch) -> Any:
        return super().loss(batch).double()


class OneScore(Compared):
    """Scores with the mean of its heads."""

    def scores(self, batch: Batch) -> Any:
        return super().scores(batch).mean(1, keepdim=True)


class NeedsLabelsToScore(Compared):
    """Scores only what was judged."""

    def scores(self, batch: Batch) -> Any:
        return super().scores(batch)[batch.pairs[:, 0]]


class Drops(Compared):
    """Leaves out hidden units at random, from a generator of its own."""

    _own: torch.Generator = PrivateAttr(default_factory=torch.Generator)

    def loss(self, batch: Batch) -> Any:
        return super().loss(batch) * torch.rand((), generator=self._own)


class Drifts(Compared):
    """Adds what it scored before."""

    _count: list[int] = PrivateAttr(default_factory=list)

    def scores(self, batch: Batch) -> Any:
        self._count.append(0)
        return super().scores(batch) + len(self._count)


class Frozen(Compared):
    """Trains the head on states that it detaches."""

    def loss(self, batch: Batch) -> Any:
        assert batch.final is not None
        states = batch.final.detach()
        scores = states @ batch.parameters["head"].T
        both = scores[batch.pairs[:, 0]] - scores[batch.pairs[:, 1]]
        return -logsigmoid(both.gather(1, batch.pair_objective[:, None])[:, 0])


class WrongSlope(Compared):
    """Detaches a factor, so that the gradient is not that of the value."""

    def loss(self, batch: Batch) -> Any:
        losses = super().loss(batch)
        return losses * losses.detach()


class OwnsTooMuch(Compared):
    """Has a bias that cancels out."""

    def parameters(self, width: int, objectives: tuple[str, ...], generator: torch.Generator) -> Mapping[str, Any]:
        return {**super().parameters(width, objectives, generator), "bias": torch.zeros(len(objectives))}


class Stuck(Compared):
    """Is a product of two matrices that both are 0 at first."""

    def parameters(self, width: int, objectives: tuple[str, ...], generator: torch.Generator) -> Mapping[str, Any]:
        return {"one": torch.zeros(3, width), "two": torch.zeros(len(objectives), 3)}

    def scores(self, batch: Batch) -> Any:
        assert batch.final is not None
        return batch.final @ batch.parameters["one"].T @ batch.parameters["two"].T

    def loss(self, batch: Batch) -> Any:
        both = self.scores(batch)[batch.pairs]
        return -logsigmoid((both[:, 0] - both[:, 1]).gather(1, batch.pair_objective[:, None])[:, 0])

    def head(self, parameters: Mapping[str, Tensor]) -> Any:
        return parameters["two"] @ parameters["one"]


class TakesRowsInTurn(Compared):
    """Takes rows by their place and not by the pairs, where there are enough."""

    def loss(self, batch: Batch) -> Any:
        scores = self.scores(batch)
        count = len(batch.pairs)
        if count > 1:
            return -logsigmoid((scores[:count] - scores[1 : count + 1]).mean(-1))
        return super().loss(batch)


class Centred(Compared):
    """Adds the distance of its scores from 0 on average over the batch."""

    def loss(self, batch: Batch) -> Any:
        return super().loss(batch) + self.scores(batch).mean() ** 2


class Standardised(Compared):
    """Scores by the distance from the best of the batch."""

    def scores(self, batch: Batch) -> Any:
        found = super().scores(batch)
        return found - found.amax(0)

    def head(self, parameters: Mapping[str, Tensor]) -> None:
        return None


class PaysForTheContext(Compared):
    """Asks for the prompt's state and does not read it."""

    needs: ClassVar[frozenset[str]] = frozenset({"final", "pairs", "context"})


class IgnoresTheLabels(Compared):
    """Does not mind which of a pair was chosen."""

    def loss(self, batch: Batch) -> Any:
        return self.differences(batch) ** 2


class WantsTheRejected(Compared):
    """Prefers the rejected."""

    def loss(self, batch: Batch) -> Any:
        return -logsigmoid(-self.differences(batch))


class AnotherJudge(Compared):
    """Takes every pair for one that the next objective judged."""

    def loss(self, batch: Batch) -> Any:
        return super().loss(replace(batch, pair_objective=(batch.pair_objective + 1) % len(batch.objectives)))


class AnotherHead(Compared):
    """Exports another head than it scores with."""

    def head(self, parameters: Mapping[str, Tensor]) -> Any:
        return parameters["head"].flip(0)


class HeadUpsideDown(Compared):
    """Exports [D,M]."""

    def head(self, parameters: Mapping[str, Tensor]) -> Any:
        return parameters["head"].T


WRONG = {
    Clairvoyant: r"needs has \['future'\]",
    WithoutLabels: 'learned from, "pairs" or "rewards"',
    OnlyTheBase: 'declare "logps" too',
    HalfPrecision: "'head': torch.bfloat16",
    FromTheWorld: "global random state of torch",
    ReadsRewards: 'declare "rewards" in `needs`: with it the same call succeeds',
    ReadsContextWhereItIs: '"context", which `needs` lacks\n  got:    other losses',
    Reduced: "one loss per pair",
    DoubleLoss: "in float32(.|\n)*torch.float64",
    OneScore: r"torch.float64 \[10, 1\]",
    NeedsLabelsToScore: "nobody has judged|a score per row",
    Drops: "other losses the second time",
    Drifts: "other scores the second time",
    Frozen: "none at batch.final",
    WrongSlope: "gradcheck",
    OwnsTooMuch: "none for 'bias'",
    Stuck: "the gradient at the first values",
    TakesRowsInTurn: "rows of the batch in another order",
    Centred: "one pair alone\n  got:    losses",
    Standardised: "one pair alone\n  got:    scores",
    PaysForTheContext: 'take "context" out of `needs`',
    IgnoresTheLabels: 'take "pairs" out of `needs`|moves the wrong way',
    WantsTheRejected: "chosen less rejected responses, for helpful: -",
    AnotherJudge: "that of batch.pair_objective",
    AnotherHead: "other than scores",
    HeadUpsideDown: r"\[4, 3\]",
}


class Mixture(RewardModel):
    """Unusual and right: several heads, and a router on the prompt that says which of them judges how much."""

    needs: ClassVar[frozenset[str]] = frozenset({"final", "context", "pairs"})
    heads: int = 2

    def parameters(self, width: int, objectives: tuple[str, ...], generator: torch.Generator) -> Mapping[str, Any]:
        shape = (self.heads, len(objectives), width)
        return {
            "heads": torch.randn(shape, generator=generator),
            "router": torch.randn((self.heads, width), generator=generator),
        }

    def weighed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What each head scores [N,K,M], and how much it counts [N,K]."""
        assert batch.final is not None and batch.context is not None
        scores = torch.einsum("nd,kmd->nkm", batch.final, batch.parameters["heads"])
        return scores, (batch.context @ batch.parameters["router"].T).softmax(-1)

    def scores(self, batch: Batch) -> Tensor:
        scores, shares = self.weighed(batch)
        return (scores * shares[:, :, None]).sum(1)

    def loss(self, batch: Batch) -> Tensor:
        scores, shares = self.weighed(batch)
        chosen, rejected = batch.pairs.T
        judge = batch.pair_objective[:, None, None].expand(-1, self.heads, 1)
        both = (scores[chosen] - scores[rejected]).gather(2, judge)[:, :, 0]
        return -(shares[chosen].log() + logsigmoid(both)).logsumexp(1)


class OfOtherScores(RewardModel):
    """Unusual and right: a weighted sum of other scores, which it does not take for labels; no adapter, no head."""

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "rewards"})

    def parameters(self, width: int, objectives: tuple[str, ...], generator: torch.Generator) -> Mapping[str, Any]:
        return {"mix": torch.eye(len(objectives))}

    def scores(self, batch: Batch) -> Tensor:
        assert batch.rewards is not None
        return batch.rewards @ batch.parameters["mix"].T

    def loss(self, batch: Batch) -> Tensor:
        both = self.scores(batch)[batch.pairs]
        return -logsigmoid((both[:, 0] - both[:, 1]).gather(1, batch.pair_objective[:, None])[:, 0])


class SmoothedMargin(Compared):
    """Unusual and right: labels that may be wrong, and a margin that grows with the strength of the judgement."""

    def loss(self, batch: Batch) -> Tensor:
        difference = self.differences(batch) - 0.1 * batch.strength
        return -0.95 * logsigmoid(difference) - 0.05 * logsigmoid(-difference)


UNUSUAL = (Compared, Mixture, OfOtherScores, SmoothedMargin)

"""Reward models from scores, or without a head, wrong in one way each; the last ones are unusual, and right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from wrong_plugins.reward_models import Compared

from moalign.api import Batch, ConfigError, RewardModel, log_ratios


class Rated(Compared):
    """Right: what those that learn from scores spoil; the squared error of each reward that is known."""

    needs: ClassVar[frozenset[str]] = frozenset({"final", "rewards"})

    def errors(self, batch: Batch) -> Tensor:
        """[N,M], 0 where the reward is not known."""
        assert batch.rewards is not None
        known = batch.rewards.isfinite()
        return (Compared.scores(self, batch) - batch.rewards.nan_to_num()).where(known, 0.0)

    def loss(self, batch: Batch) -> Any:
        return (self.errors(batch) ** 2).sum(-1)


class Implicit(RewardModel):
    """Right: what those without a head spoil; one objective, the log-ratio of the whole response."""

    needs: ClassVar[frozenset[str]] = frozenset({"logps", "reference", "pairs"})
    beta: float = 0.05

    def parameters(self, width: int, objectives: tuple[str, ...], generator: torch.Generator) -> Mapping[str, Any]:
        if len(objectives) != 1:
            raise ConfigError("one log-ratio cannot be several scores: name one objective")
        return {}

    def scores(self, batch: Batch) -> Any:
        return self.beta * log_ratios(batch)[:, None]

    def loss(self, batch: Batch) -> Any:
        scores = Implicit.scores(self, batch)[:, 0]
        return -logsigmoid(scores[batch.pairs[:, 0]] - scores[batch.pairs[:, 1]])


class TakesNobody(Implicit):
    """Refuses any number of objectives."""

    def parameters(self, width: int, objectives: tuple[str, ...], generator: torch.Generator) -> Mapping[str, Any]:
        raise ConfigError("not so many")


class PerScore(Rated):
    """Returns a loss for each row and objective."""

    def loss(self, batch: Batch) -> Any:
        return self.errors(batch) ** 2


class SumsTheUnknown(Rated):
    """Adds up rewards that are not known."""

    def loss(self, batch: Batch) -> Any:
        return ((self.scores(batch) - batch.rewards) ** 2).sum(-1)


class DividesByTheKnown(Rated):
    """Divides by how many rewards are known, of which there may be none."""

    def loss(self, batch: Batch) -> Any:
        assert batch.rewards is not None
        return super().loss(batch) / batch.rewards.isfinite().sum(-1)


class InfiniteScore(Implicit):
    """Divides by the number of tokens of a row that has none."""

    def scores(self, batch: Batch) -> Any:
        return super().scores(batch) / batch.mask.sum(-1)[:, None]


class WritesIntoRewards(Rated):
    """Fills in the rewards that are not known."""

    def loss(self, batch: Batch) -> Any:
        assert batch.rewards is not None
        losses = super().loss(batch)
        batch.rewards.nan_to_num_()
        return losses


class WithoutAGraph(Implicit):
    """Has no gradient."""

    def loss(self, batch: Batch) -> Any:
        return super().loss(batch).detach()


class ForgetsTheMask(Implicit):
    """Sums over padding too, where log-probabilities are 0, but not their gradients."""

    def loss(self, batch: Batch) -> Any:
        assert batch.ref_logps is not None
        ratios = self.beta * (batch.logps - batch.ref_logps).sum(-1)
        return -logsigmoid(ratios[batch.pairs[:, 0]] - ratios[batch.pairs[:, 1]])


class SteepAtTheBase(Implicit):
    """A root, whose slope is infinite where the states are 0."""

    needs: ClassVar[frozenset[str]] = frozenset({"logps", "reference", "pairs", "final"})

    def loss(self, batch: Batch) -> Any:
        assert batch.final is not None
        states = batch.final[batch.pairs[:, 0]]
        return super().loss(batch) + states.mean(-1) + (0 * states).abs().sum(-1).sqrt()


class Badness(Rated):
    """Takes larger rewards for worse ones."""

    def loss(self, batch: Batch) -> Any:
        assert batch.rewards is not None
        known = batch.rewards.isfinite()
        return ((self.scores(batch) + batch.rewards.nan_to_num()).where(known, 0.0) ** 2).sum(-1)


class UnknownIsNought(Rated):
    """Takes a reward that is not known for 0."""

    def loss(self, batch: Batch) -> Any:
        assert batch.rewards is not None
        return ((self.scores(batch) - batch.rewards.nan_to_num()) ** 2).sum(-1)


class NoughtBesideOthers(UnknownIsNought):
    """Takes a reward that is not known for 0, where another one of the row is known."""

    def loss(self, batch: Batch) -> Any:
        assert batch.rewards is not None
        return super().loss(batch) * batch.rewards.isfinite().any(-1)


WRONG = {
    TakesNobody: "refused for 3, 2 and 1: ConfigError: not so many",
    PerScore: r"torch.float64 \[10, 3\]",
    SumsTheUnknown: "the loss of row 0 is not finite|the loss of row 1 is not finite",
    DividesByTheKnown: "a reward that is NaN is not known",
    InfiniteScore: "a score that is not finite, of row 9",
    WritesIntoRewards: "rewards changed during the call",
    WithoutAGraph: "losses without a graph",
    ForgetsTheMask: "gradient outside the mask",
    SteepAtTheBase: "one that is not finite at batch.final",
    Badness: "rewards times scores, for helpful: -",
    UnknownIsNought: "a row of which all rewards are NaN\n  got:    a gradient",
    NoughtBesideOthers: "that they have where these rewards are 0",
}


class OfOutcomes(Implicit):
    """Unusual and right: one objective, the cross entropy of an outcome between 0 and 1, and no pairs."""

    needs: ClassVar[frozenset[str]] = frozenset({"logps", "reference", "rewards"})

    def loss(self, batch: Batch) -> Tensor:
        assert batch.rewards is not None
        score, outcome = self.scores(batch)[:, 0], batch.rewards[:, 0]
        known = outcome.isfinite()
        outcome = outcome.nan_to_num()
        return -(outcome * logsigmoid(score) + (1 - outcome) * logsigmoid(-score)).where(known, 0.0)


UNUSUAL = (Rated, Implicit, OfOutcomes)

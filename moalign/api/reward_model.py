"""The kind reward model: scores by objective that are learned from judgements, and the loss that learns them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from moalign.api.plugin import Plugin
from moalign.batch import Batch

if TYPE_CHECKING:
    from torch import Generator, Tensor


class RewardModel(Plugin):
    """Scores of responses, one per objective, learned from judgements on an adapted base.

    ``needs`` names what the engine must supply, and it supplies nothing else:
    "final"      the last hidden state of each whole sequence (``batch.final`` [N,D]), with the graph to the adapter
    "context"    the hidden state at the prompt's end (``batch.context`` [N,D]), with the graph
    "pairs"      labelled pairs, chosen before rejected, each judged by one objective
    "rewards"    scores per row and objective (``batch.rewards`` [N,M]), NaN where unknown
    "logps"      token log-probabilities under the adapted model (``batch.logps``), with the graph
    "reference"  the same under the base (``batch.ref_logps``)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"final", "pairs"})

    @property
    def log_odds(self) -> bool:
        """Whether P(chosen above rejected) is the sigmoid of the difference of scores: what the loss fits, and not only
        an order. False: the report fits a slope of its own."""
        return False

    def check(self, objectives: tuple[str, ...]) -> None:
        """Raise ConfigError where options and objectives do not go together; before any model is loaded."""

    def parameters(self, width: int, objectives: tuple[str, ...], generator: Generator) -> Mapping[str, Tensor]:
        """First values of the head's tensors, by name; float32 on the CPU. ``width``: of a hidden state."""
        return {}

    def lr_factor(self, name: str) -> float:
        """What the learning rate of the adapter is multiplied by for the parameter ``name``."""
        return 1.0

    def loss(self, batch: Batch) -> Tensor:
        """float32 [P], one value per pair, or without "pairs" in ``needs`` [N], one per row; never reduced. The head's
        tensors are ``batch.parameters``."""
        raise NotImplementedError

    def scores(self, batch: Batch) -> Tensor:
        """[N,M], larger is better, in the order of the objectives. A function of each row alone."""
        raise NotImplementedError

    def head(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """[M,D] with scores = final @ head.T, the form of a transformers sequence classifier; None where the scores are
        of another form."""
        return None

"""The kind filter: which of a round's sampled responses, or pairs of them, are trained on, and how much each counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moalign.api.plugin import Plugin
from moalign.batch import Kept, Sampled

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Filter(Plugin):
    """Chooses among the responses of a round once they are scored; what it has no method for it leaves as it is.

    Advantages are computed before it, from all responses that every objective has scored, and what a combiner, a
    transform or a reference sees of a round are all of them too: a mean or deviation over what a filter has left would
    make its choice the baseline (of the best response to each prompt every advantage would be 0). So a filter decides
    whose gradient counts, never what a response is worth. What a loss itself compares within a step is what was kept.

    A step's loss is the weighted mean over what it holds: a weight of 2 counts as the same response there twice, and
    only weights relative to those of the same step matter. A pair of responses has the product of their weights, which
    is how often it occurs among the pairs of responses that are there so often.
    """

    @classmethod
    def has(cls, method: str) -> bool:
        """Whether it chooses by this one of its two methods."""
        return getattr(cls, method) is not getattr(Filter, method)

    def check(self, objectives: Sequence[str]) -> None:
        """Raise ConfigError where the options do not work with these objectives. Called before a model is loaded."""

    def keep_responses(self, about: Sampled, generator: Generator) -> Kept:
        """Which of the N responses are kept, and how often each counts.

        A function of its arguments; what it draws, it draws from the generator, whose seed depends on the run's and on
        the round's number.
        """
        raise NotImplementedError

    def keep_pairs(self, about: Sampled, pairs: Tensor, generator: Generator) -> Kept:
        """The same for labelled pairs, int64 [P,2]: rows of the chosen response, which has the larger signal, and of
        the rejected one, among those that ``keep_responses`` has kept. Asked only where the loss learns from such.
        """
        raise NotImplementedError

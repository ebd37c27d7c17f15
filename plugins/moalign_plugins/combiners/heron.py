"""Responses compared by one objective after the other, in order of importance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Combiner, Preference
from moalign_plugins.combiners._in_order import decided, levels_of
from moalign_plugins.combiners._preferences import needs_weights

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "heron",
    "class": "HERON",
    "summary": "share of comparisons won within a prompt, the most important objective that differs deciding",
    "paper": "arXiv:2309.02632",
}


class HERON(Combiner):
    """Comparisons won less those lost, over all others to the same prompt: between -1 and 1. After arXiv 2309.02632.

    Two responses are compared by the objective of the largest weight; only where that differs by no more than the
    margin, by the next. Objectives of equal weight are compared by their mean, those without weight never. The paper
    trains a reward model on the decided pairs; here they are counted. With a margin comparisons may go in circles.
    Pairs from files are decided by "heron-pairs".
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})
    pointwise: ClassVar[bool] = False
    monotone: ClassVar[bool] = False  # with a margin, whose size follows the spread of the round

    margin: float = Field(default=0.0, ge=0)
    """differences up to this many standard deviations of the round (divisor N - 1) decide nothing"""

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "heron")

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        import torch

        signal = torch.zeros_like(rewards[:, 0])
        for group in groups.unique():
            rows = (groups == group).nonzero().squeeze(1)
            levels = levels_of(rewards, preference[rows[0]])
            margins = self.margin * (levels.std(0) if len(levels) > 1 else torch.zeros_like(levels[0]))
            signal[rows] = _won(levels[rows], margins) / max(len(rows) - 1, 1)
        return signal


def _won(levels: Tensor, margins: Tensor) -> Tensor:
    """Comparisons won less those lost, [G,L] and [L] -> [G]."""
    return decided(levels[:, None] - levels[None, :], margins).sum(1)

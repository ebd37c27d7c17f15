"""B-STaR's threshold on rewards: fixed, or the one that balances how many right responses there are and how pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from moalign.api import Filter, Kept, Sampled
from moalign_plugins.filters._right import check_objective, rewards_of

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "reward-threshold",
    "class": "RewardThreshold",
    "summary": "responses with a reward of a threshold or more, fixed or found in each round (B-STaR)",
    "paper": "arXiv:2412.17256",
}


class RewardThreshold(Filter):
    """Different responses whose reward is the threshold or more; of repeated ones the first sampled.

    Without ``threshold`` each round has its own: the one of the ``grid`` with the largest balance score (B-STaR,
    arXiv 2412.17256), min(c/n*, 1) c/n, a mean over the round's prompts, with n the different responses to a prompt
    that would be kept, c those of them that are right, and 0 where none would be. Of equal scores the lowest threshold
    is taken, which keeps most. The paper moves the temperature by the score as well, and samples more where too little
    is left; this filter does neither. What is right must be known from elsewhere than from the reward itself, or any
    threshold above ``right`` is perfect.
    """

    objective: str | None = None
    """whose rewards are compared with the threshold, before any transform; none: the combined reward"""
    threshold: float | None = None
    right_by: str | None = None
    """the objective whose rewards say which response is right; where there is no threshold"""
    right: float = 1.0
    """a response with so much of that reward or more is right"""
    wanted: int = Field(default=8, ge=1)
    """n*: right responses to a prompt beyond which more add nothing"""
    grid: tuple[float, float, float] | None = None
    """lowest, highest and step of the thresholds that are tried, (-1, 1, 0.01) in the paper; none: every reward of the
    round, between which the score does not change"""

    @model_validator(mode="after")
    def _whole(self) -> RewardThreshold:
        if (self.threshold is None) == (self.right_by is None):
            raise ValueError("give either threshold, or right_by, the objective that says what is right")
        if self.grid is not None and not (self.grid[0] <= self.grid[1] and self.grid[2] > 0):
            raise ValueError("grid is lowest, highest and step, such as [-1, 1, 0.01]")
        return self

    def check(self, objectives: Sequence[str]) -> None:
        check_objective(self.objective, objectives, "objective")
        check_objective(self.right_by, objectives, "right_by")

    def keep_responses(self, about: Sampled, generator: Generator) -> Kept:
        rewards, first = rewards_of(about, self.objective), first_of_each(about)
        threshold, figures = self.threshold, {}
        if threshold is None:
            right = rewards_of(about, self.right_by) >= self.right
            found = [
                (balance(first & (rewards >= each), right, about.groups, self.wanted), -each)
                for each in self._tried(rewards)
            ]
            best, negative = max(found)
            threshold = -negative
            figures = {"threshold": threshold, "balance": best}
        low = rewards < threshold
        both = zip(low.tolist(), first.tolist(), strict=True)
        reasons = tuple("below the threshold" if under else "" if new else "repeated" for under, new in both)
        return Kept((first & ~low).double(), reasons, figures)

    def _tried(self, rewards: Tensor) -> list[float]:
        if self.grid is None:
            return rewards.unique().tolist()
        lowest, highest, step = self.grid
        return [lowest + step * place for place in range(int((highest - lowest) / step + 1e-9) + 1)]


def balance(kept: Tensor, right: Tensor, groups: Tensor, wanted: int) -> float:
    """min(c/n*, 1) c/n, a mean over the prompts; ``kept`` and ``right`` bool [N], groups [N], ``wanted`` n*."""
    import torch

    _, group = groups.unique(return_inverse=True)
    none = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    count = none.index_add(0, group, kept.double())
    correct = none.index_add(0, group, (kept & right).double())
    return float(((correct / wanted).clamp(max=1) * correct / count.clamp(min=1)).mean())


def first_of_each(about: Sampled) -> Tensor:
    """Bool [N]: whether no earlier response to the prompt has the same text."""
    import torch

    known: set[tuple[int, str]] = set()
    first = []
    for each in zip(about.groups.tolist(), about.texts, strict=True):
        first.append(each not in known)
        known.add(each)
    return torch.tensor(first)

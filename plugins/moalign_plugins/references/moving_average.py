"""An average of the policies so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from moalign.api import Move, Progress, Reference

REGISTRATION = {
    "name": "moving-average",
    "class": "MovingAverage",
    "summary": "an exponential moving average of the policy's weights",
    "paper": "arXiv:2506.16141",
}


class MovingAverage(Reference):
    """theta_ref <- decay * theta_ref + (1 - decay) * theta, every so many steps; of weights, not of adapters' factors.

    GRPO-CARE (arXiv 2506.16141) has decay 0.995 every 10 steps, as in its authors' code. It begins as the policy does:
    as the base, or as the adapter of a warm start. With decay 1 it stays there, with 0 it is the policy.

    All weights stand on one base, so the average is of what adapters add to it: decay * D + (1 - decay) * s B A. That
    is exact while its rank is at most ``rank``; beyond, the nearest of this rank takes its place each time. The metric
    ``reference/lost`` bounds what that has left out in all, as a share of what is there: each cut weighs ``decay`` less
    with every update after it, and norms add up at the most.
    """

    decay: float = Field(default=0.995, ge=0, le=1)
    every: int = Field(default=10, ge=1)
    """steps between two updates; with rounds of sampled responses, at the first round that begins then or later"""
    rank: int = Field(default=32, ge=1)
    """of the average at the most"""

    def largest_rank(self) -> int:
        return self.rank

    def init(self) -> Mapping[str, Any]:
        return {"step": None}

    def moves(self, at: Progress, state: Mapping[str, Any]) -> tuple[Move | None, Mapping[str, Any]]:
        if state["step"] is None:
            return Move(), {"step": at.step}
        if at.step - state["step"] < self.every:
            return None, state
        return Move(policy=1 - self.decay, reference=self.decay), {"step": at.step}

"""The cross-entropy of outcomes, as reward models learn it from a file and while a policy is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.api import DataError

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy(reward: Tensor, outcome: Tensor) -> Tensor:
    """-o log sigmoid(r) - (1 - o) log sigmoid(-r); [N]. Raises DataError where an outcome is not from 0 to 1."""
    from torch.nn.functional import logsigmoid

    if ((outcome < 0) | (outcome > 1)).any():
        raise DataError("a score of an outcome is not from 0 (wrong) to 1 (right); is the objective's direction max?")
    return -outcome * logsigmoid(reward) - (1 - outcome) * logsigmoid(-reward)

"""The logistic loss of a difference of scores, as forms that learn from pairs share it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def logistic(logits: Tensor, label_smoothing: Tensor | float = 0.0) -> Tensor:
    """-q log sigmoid(z) - (1 - q) log sigmoid(-z) with q = (1 - e) y + e/2 at y = 1, e = label_smoothing; [P]."""
    from torch.nn.functional import logsigmoid

    if isinstance(label_smoothing, float) and label_smoothing == 0:
        return -logsigmoid(logits)
    wrong = label_smoothing / 2
    return -(1 - wrong) * logsigmoid(logits) - wrong * logsigmoid(-logits)

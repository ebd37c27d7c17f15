"""What the losses share that compare a policy with a target over all responses to a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign_plugins._groups import group_log_softmax, group_size

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy(values: Tensor, targets: Tensor, groups: Tensor) -> Tensor:
    """-G q_i log softmax(values)_i of each of the G responses to a prompt, the softmax over these; [N].

    The mean over the responses to a prompt is their cross entropy, so that a prompt counts with its responses.
    """
    return -group_size(values, groups) * targets * group_log_softmax(values, groups)

"""The log-sigmoid of how much better a response is than a good one of the untouched base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Responses, Transform
from moalign_plugins.transforms._comparison import reference_rewards

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "log-sigmoid",
    "class": "LogSigmoid",
    "summary": "log-sigmoid of the distance to a percentile of the base: what is good enough counts no more",
    "paper": "arXiv:2402.00742",
}


class LogSigmoid(Transform):
    """log sigmoid(r - ref). arXiv 2402.00742.

    ref is a percentile of the rewards of the untouched base's responses to the same prompt (interpolated between two of
    them; 85 in the paper), or one number for all prompts. The sum over objectives is the log of the probability that
    the response is good in all of them, each with its Bradley-Terry probability: a logical and. Never above 0; far
    below ref it falls as r - ref does.
    """

    pointwise: ClassVar[bool] = True

    percentile: float = Field(default=85.0, ge=0, le=100)
    """of the base's rewards for the prompt"""
    samples: int = Field(default=10, ge=1)
    """responses of the base to each prompt"""
    reference: float | None = None
    """one number instead, such as the reward of a canned refusal; then nothing is sampled from the base"""

    def references(self) -> int:
        return self.samples if self.reference is None else 0

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        from torch.nn.functional import logsigmoid

        return logsigmoid(rewards - self._threshold(about)), state

    def _threshold(self, about: Responses) -> Tensor | float:
        if self.reference is not None:
            return self.reference
        return reference_rewards(about).nanquantile(self.percentile / 100, dim=1)

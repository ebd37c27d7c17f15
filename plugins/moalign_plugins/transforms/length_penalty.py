"""A price on long responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.api import Responses, Transform

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "length-penalty",
    "class": "LengthPenalty",
    "summary": "less reward for each token beyond a limit, and for responses that were cut",
    "paper": "arXiv:2502.18770",
}


class LengthPenalty(Transform):
    """r - per_token * max(0, tokens - limit), and - truncated where the response was cut before its end.

    The tokens are the response's, its end-of-sequence token among them. Limit and price are those of arXiv 2502.18770.
    """

    pointwise: ClassVar[bool] = True

    limit: int = Field(default=300, ge=0)
    """tokens that cost nothing"""
    per_token: float = Field(default=0.01, ge=0)
    """price of each token beyond it"""
    truncated: float = Field(default=0.0, ge=0)
    """price of being cut at rollouts.max_new_tokens, beside that of the tokens"""

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        beyond = (about.lengths - self.limit).clamp(min=0).to(rewards)
        return rewards - self.per_token * beyond - self.truncated * (~about.ended).to(rewards), state

"""A price on long right answers, to the prompts that the policy answers best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from moalign.api import Responses, Transform
from moalign_plugins._groups import group_deviation, group_mean

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "grpo-lambda",
    "class": "GRPOLambda",
    "summary": "right or wrong; right answers pay for length where the policy is right most often (GRPO-lambda)",
    "paper": "arXiv:2505.18086",
}

ROUNDING = 1e-9  # of a share times a count, which must not open one place more


class GRPOLambda(Transform):
    """1 - alpha sigmoid((n - mean) / deviation) for a right answer of n tokens in the ``share`` of the groups with the
    highest ratio of right answers; 1 for right answers in the other groups, and 0 for every wrong one.

    GRPO-lambda, arXiv 2505.18086 (arXiv 2510.00194 has the same name for lambda-returns). A group is the responses to
    one prompt; mean and deviation (divisor n - 1) are those of its right answers' lengths. With share 0 it is the 0/1
    reward, with 1 the length has its price everywhere. Unverified: the formula and alpha 0.6 are from a page on the
    method, which leaves open what follows.

    ``share`` times the number of groups is rounded up. Of groups with the same ratio those with the longer right
    answers come first; where these are alike too, and not all of them have a place, none has. Where the deviation is 0,
    as for a single right answer, an answer is of mean length and pays alpha / 2. A group without a right answer is 0.

    A loss that divides by the deviation within a group, as `grpo` does, takes alpha out where all answers of a group
    are right.
    """

    share: float = Field(default=0.2, ge=0, le=1)
    """lambda: of the groups of a round, in which length has a price"""
    alpha: float = Field(default=0.6, ge=0, le=1)
    """the most that length can cost; an answer of mean length pays half of it"""
    threshold: float = 0.5
    """an answer with more reward than this is right"""

    def apply(self, rewards: Tensor, about: Responses, state: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        right = rewards > self.threshold
        found = right.to(rewards)
        lengths, groups = about.lengths[right].to(rewards), about.groups[right]
        deviation = group_deviation(lengths, groups)
        beyond = (lengths - group_mean(lengths, groups)) / deviation.where(deviation > 0, 1.0)
        pays = self._best_groups(found, about)[right]
        found[right] = found[right] - self.alpha * beyond.sigmoid() * pays
        return found, state

    def _best_groups(self, right: Tensor, about: Responses) -> Tensor:
        """1 for the responses of the groups in which length has a price, 0 for the others; [N]."""
        _, index = about.groups.unique(return_inverse=True)
        sizes, answers, tokens = (
            right.new_zeros(int(index.max()) + 1).index_add(0, index, values)
            for values in (right * 0 + 1, right, right * about.lengths)
        )
        ratio, length = answers / sizes, tokens / answers.clamp(min=1)
        alike = ratio[:, None] == ratio
        not_worse = (ratio > ratio[:, None]) | (alike & (length >= length[:, None]))
        places = math.ceil(self.share * len(sizes) - ROUNDING)
        return (not_worse.sum(1) <= places).to(right)[index]

"""The policy of the round before."""

from __future__ import annotations

from pydantic import Field

from moalign.api import ConfigError, Progress
from moalign_plugins.references._copies import Copies

REGISTRATION = {
    "name": "previous-iterate",
    "class": "PreviousIterate",
    "summary": "the policy at the start of the round under way: iterated training",
    "paper": "arXiv:2407.00617, arXiv:2404.03715, arXiv:2405.19332",
}


class PreviousIterate(Copies):
    """pi_ref = pi_t, the policy that samples round t, while pi_(t+1) is trained on its responses.

    As in INPO (arXiv 2407.00617), DNO (arXiv 2404.03715) and SELM (arXiv 2405.19332): each round takes one step of a
    mirror descent, so that the distance to the base is bounded no more by the loss alone. In the first round it is what
    training starts from: the base, or the adapter of a warm start.

    Where the responses are in the data there are no rounds, and ``every`` says how many steps take the place of one.
    """

    every: int | None = Field(default=None, ge=1)
    """steps between two copies, where there are no rounds of sampled responses"""

    def check(self, rounds: bool) -> None:
        if rounds and self.every is not None:
            raise ConfigError(
                "reference.every: a round of sampled responses is an iterate, rollouts.rounds says how many there are; "
                "leave it out"
            )
        if not rounds and self.every is None:
            raise ConfigError("reference.every: there are no rollouts; say after how many steps an iterate ends")

    def due(self, at: Progress, since: int) -> bool:
        return at.round is not None if self.every is None else since >= self.every

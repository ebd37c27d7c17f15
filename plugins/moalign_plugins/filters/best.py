"""Best-of-n: the best responses to each prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from moalign.api import Filter, Kept, Sampled
from moalign_plugins.filters._ranked import chosen, ranked

if TYPE_CHECKING:
    from torch import Generator

REGISTRATION = {
    "name": "best",
    "class": "Best",
    "summary": "of the responses to each prompt those with the largest combined reward (best-of-n, SuperHF)",
    "paper": "arXiv:2409.06957, arXiv:2310.16763",
}


class Best(Filter):
    """Of each prompt's responses the ``keep`` with the largest combined reward.

    The rule BoN of PF-PPO (Shen and Zhang, arXiv 2409.06957), and beside a loss that imitates what is kept the filter
    of SuperHF (arXiv 2310.16763), which keeps 1 of 16. By prompt: the best of a whole round would be responses to the
    easiest prompts. A reward that is wrong for what it likes best is followed where it is wrong; keeping the worst
    beside the best is PF-PPO's remedy. Of equal responses those sampled first are kept.
    """

    keep: int = Field(default=1, ge=1)
    """how many to each prompt; all where there are no more"""

    def keep_responses(self, about: Sampled, generator: Generator) -> Kept:
        rows = [row for each in ranked(about) for row in each[: self.keep].tolist()]
        return chosen(about, rows, "not among the best")

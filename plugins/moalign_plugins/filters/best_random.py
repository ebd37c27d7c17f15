"""PF-PPO's best response to each prompt beside one of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from moalign.api import Filter, Kept, Sampled
from moalign_plugins.filters._ranked import chosen, drawn, ends, ranked

if TYPE_CHECKING:
    from torch import Generator

REGISTRATION = {
    "name": "best-random",
    "class": "BestRandom",
    "summary": "the best response to each prompt and one of the others at random (PF-PPO)",
    "paper": "arXiv:2409.06957",
}


class BestRandom(Filter):
    """The response with the largest combined reward to each prompt, and one of the others, each as likely.

    The rule BR of PF-PPO (Shen and Zhang, arXiv 2409.06957). Of equal best responses the first sampled is the best; a
    single response to a prompt is kept.

    ``resampled``: as many draws with replacement as the prompt has responses, in which all that have the best reward
    have the share ``best`` and the others ``others``, 0.4 and 0.1 in the paper; how often one is drawn is its weight.
    That equal best ones each have the share is how its weights by value are read here, and has not been compared with
    the authors' code.
    """

    resampled: bool = False
    best: float = Field(default=0.4, gt=0)
    """share of a best response among the draws; where ``resampled``"""
    others: float = Field(default=0.1, gt=0)
    """share of any other"""

    def keep_responses(self, about: Sampled, generator: Generator) -> Kept:
        import torch

        if self.resampled:
            shares = torch.full_like(about.signal, self.others)
            for each, best, _ in ends(about):
                shares[each[:best]] = self.best
            return drawn(about, shares, generator)
        rows = []
        for each in ranked(about):
            rows.append(int(each[0]))
            if len(each) > 1:
                rows.append(int(each[1 + int(torch.randint(len(each) - 1, (), generator=generator))]))
        return chosen(about, rows, "not drawn")

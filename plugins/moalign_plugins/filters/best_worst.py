"""PF-PPO's best and worst response to each prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.api import Filter, Kept, Sampled
from moalign_plugins.filters._ranked import chosen, drawn, ends, ranked

if TYPE_CHECKING:
    from torch import Generator

REGISTRATION = {
    "name": "best-worst",
    "class": "BestWorst",
    "summary": "the best and the worst response to each prompt (PF-PPO)",
    "paper": "arXiv:2409.06957",
}


class BestWorst(Filter):
    """The response with the largest and the one with the smallest combined reward to each prompt.

    The rule BW of PF-PPO (Shen and Zhang, arXiv 2409.06957): proxies are most to be trusted at both ends. By prompt: a
    port elsewhere takes both ends of a whole batch, which is another rule. Of equal responses the first sampled is the
    best and the last sampled the worst; a single response to a prompt is kept.

    ``resampled``: as many draws with replacement as the prompt has responses, from all that have the best or the worst
    reward, each as likely; how often one is drawn is its weight. The paper's second form. That equal ones share so is
    how its weights by value are read here, and has not been compared with the authors' code.
    """

    resampled: bool = False

    def keep_responses(self, about: Sampled, generator: Generator) -> Kept:
        if not self.resampled:
            rows = [int(each[place]) for each in ranked(about) for place in (0, -1)]
            return chosen(about, rows, "between")
        shares = about.signal.new_zeros(len(about.signal))
        for each, best, worst in ends(about):
            shares[each[:best]] = 1.0
            shares[each[len(each) - worst :]] = 1.0
        return drawn(about, shares, generator)

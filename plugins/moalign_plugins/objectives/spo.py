"""Self-supervised preference optimisation: DPO, and telling how much of a response is missing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from moalign.api import Batch, Objective, PairTerms, PluginError, Sample, pair_logits
from moalign_plugins.objectives._pairs import logistic

if TYPE_CHECKING:
    from torch import Generator, Tensor

REGISTRATION = {
    "name": "spo",
    "class": "SPO",
    "summary": "DPO beside a head that tells how many key words are missing from a response",
    "paper": "arXiv:2409.17791",
}
WORD = re.compile(r"\S+\s*")


class SPO(Objective):
    """-log sigmoid(z) + gamma * (CE(yw) + CE(yl)), z = scale * beta * d - margin as in DPO.

    Of each response there are ``levels`` versions: level 0 is the response itself, and level j lacks the share
    j / (levels - 1) of its key words, rounded up. A linear head on the mean of the hidden states that predict a
    version's tokens [N,D] says which level it is, and CE is its cross-entropy, averaged over the levels. One head
    serves chosen and rejected responses; it begins at 0, so that CE begins at log(levels). With gamma 0 it is DPO,
    without a head and without versions.

    Words are what white space separates. Key words are here the longest, as many as ``key_share`` of all, of equally
    long ones those that come first; the longest are deleted first, and one word is always left. A pair with a response
    of too few words for as many different versions is left out and counted. arXiv 2409.17791, unverified: the authors'
    repository holds no code, so that the extractor of key phrases, the pooling and all values here are ours. The paper
    adds its term to any pairwise loss; here that is DPO's.

    Each pair brings 2 (levels - 1) sequences more. A combiner's scale and margin act on z alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})
    needs_with: ClassVar[Mapping[str, frozenset[str]]] = {"gamma": frozenset({"hidden"})}

    beta: float = Field(default=0.1, gt=0)
    """strength of the KL penalty towards the reference"""
    gamma: float = Field(default=0.1, ge=0)
    """weight of telling the levels; 0 is DPO"""
    levels: int = Field(default=3, ge=2)
    """versions of each response, itself among them"""
    key_share: float = Field(default=0.5, gt=0, le=1)
    """share of the words that are key words"""

    def views(self, chosen: Sample, rejected: Sample) -> Mapping[str, Sample]:
        """Named by side and level; none where a response has too few words."""
        if not self.gamma:
            return {}
        sides = {"chosen": self.degraded(chosen.response), "rejected": self.degraded(rejected.response)}
        if not all(sides.values()):
            return {}
        return {
            f"{side} {level}": Sample(chosen.prompt, text)
            for side, texts in sides.items()
            for level, text in enumerate(texts, 1)
        }

    def degraded(self, response: str) -> list[str]:
        """The versions from level 1 on; empty where the response has too few words for as many different ones."""
        words = WORD.findall(response)
        longest = sorted(range(len(words)), key=lambda place: (-len(words[place].rstrip()), place))
        most = min(round(self.key_share * len(words)), len(words) - 1)
        if most < self.levels - 1:
            return []
        start = response[: len(response) - len(response.lstrip())]
        texts = []
        for level in range(1, self.levels):
            deleted = set(longest[: -(-level * most // (self.levels - 1))])
            texts.append(start + "".join(word for place, word in enumerate(words) if place not in deleted).rstrip())
        return texts

    def parameters(self, width: int, generator: Generator) -> Mapping[str, Tensor]:
        import torch

        if not self.gamma:
            return {}
        return {"level.weight": torch.zeros(self.levels, width), "level.bias": torch.zeros(self.levels)}

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        losses = logistic(pair_logits(batch, terms, self.beta))
        if not self.gamma:
            return losses
        if not batch.views:
            few = f"no pair of responses has words enough for {self.levels} versions of each"
            raise PluginError(f"objective 'spo': {few}; lower levels, or raise key_share")
        scores = self._scores(batch)
        for side, name in enumerate(("chosen", "rejected")):
            rows = [batch.pairs[:, side], *(batch.views[f"{name} {level}"] for level in range(1, self.levels))]
            told = [scores[of_level, level] for level, of_level in enumerate(rows)]
            losses = losses - self.gamma * sum(told[1:], told[0]) / self.levels
        return losses

    def _scores(self, batch: Batch) -> Tensor:
        """log-probability of each level; [N,levels]."""
        if batch.hidden is None:
            raise PluginError("objective 'spo' reads hidden states, and the engine supplies none")
        weight, bias = batch.parameters["level.weight"], batch.parameters["level.bias"]
        counts = batch.mask.sum(-1, keepdim=True).clamp(min=1)
        pooled = (batch.hidden * batch.mask[:, :, None]).sum(1) / counts
        return (pooled @ weight.t() + bias).log_softmax(-1)

"""Losses that read guides or views, wrong in one way each; the doc string says which. The last one is right."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from moalign.api import Batch, Objective, PairTerms, Sample, log_ratios, pair_logits

NUMBERS = count()


class Twice(Objective):
    """Right: reads a guide, a response of the reference, and the rejected response behind the prompt doubled."""

    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference", "reference_responses"})
    guide: str = "a/folder"

    def guides(self) -> Mapping[str, str]:
        return {"guide": self.guide}

    def views(self, chosen: Sample, rejected: Sample) -> Mapping[str, Sample]:
        prompt = chosen.prompt if isinstance(chosen.prompt, str) else (*chosen.prompt, *chosen.prompt)
        return {"twice": Sample(prompt * 2 if isinstance(prompt, str) else prompt, rejected.response)}

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        ratios, guide = log_ratios(batch), (batch.guides["guide"] * batch.mask).sum(-1)
        beside = sum(ratios[rows] for rows in batch.views.values())
        return -logsigmoid(pair_logits(batch, terms, 0.1) - 0.1 * beside + 0.1 * guide[batch.pairs[:, 0]])


class Misnamed(Twice):
    """Names the guide otherwise than the option."""

    def guides(self) -> Mapping[str, str]:
        return {"teacher": self.guide}


class Wandering(Twice):
    """Another folder each time."""

    def guides(self) -> Mapping[str, str]:
        return {"guide": f"{self.guide}{next(NUMBERS)}"}


class NoFolder(Twice):
    """A guide that is no text."""

    def guides(self) -> Mapping[str, str]:
        return {"guide": 3}  # type: ignore[dict-item]


class UnreadGuide(Twice):
    """Names a guide and does not read it."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        beside = sum(log_ratios(batch)[rows] for rows in batch.views.values())
        return -logsigmoid(pair_logits(batch, terms, 0.1) - 0.1 * beside)


class UnreadView(Twice):
    """Asks for a view and does not read it."""

    def loss(self, batch: Batch, terms: PairTerms) -> Tensor:
        guide = (batch.guides["guide"] * batch.mask).sum(-1)[batch.pairs[:, 0]]
        own = log_ratios(batch)[batch.views["reference"]]
        return -logsigmoid(pair_logits(batch, terms, 0.1) - 0.1 * own + 0.1 * guide)


class OtherNames(Twice):
    """Names that depend on the pair."""

    def views(self, chosen: Sample, rejected: Sample) -> Mapping[str, Sample]:
        return {chosen.response[:3]: rejected}


class Counting(Twice):
    """Views that depend on what was asked before."""

    def views(self, chosen: Sample, rejected: Sample) -> Mapping[str, Sample]:
        return {"again": Sample(chosen.prompt, f"{next(NUMBERS)}")}


class Reserved(Twice):
    """The name that is the engine's."""

    def views(self, chosen: Sample, rejected: Sample) -> Mapping[str, Sample]:
        return {"reference": rejected}


class NoSample(Twice):
    """A view that is no sample."""

    def views(self, chosen: Sample, rejected: Sample) -> Mapping[str, Sample]:
        return {"again": chosen.response}  # type: ignore[dict-item]


class Silent(Twice):
    """A view without a response."""

    def views(self, chosen: Sample, rejected: Sample) -> Mapping[str, Sample]:
        return {"again": Sample(chosen.prompt, " ")}


WRONG = {
    Misnamed: r"the names \['teacher'\], which are no options",
    Wandering: r"guides\(\) twice",
    NoFolder: "return folders by name",
    UnreadGuide: "do not ask for it in guides, or use it",
    UnreadView: "do not ask for it in views, or use it",
    OtherNames: "give every pair the same names",
    Counting: "make them a function of the pair alone",
    Reserved: "leave that name to the engine",
    NoSample: "return moalign.api.Sample by name",
    Silent: "no response in",
}
UNUSUAL = (Twice,)

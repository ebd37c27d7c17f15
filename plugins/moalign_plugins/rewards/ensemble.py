"""Several sequence classifiers that score together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from moalign.api import Sample
from moalign_plugins.rewards._classifiers import FromClassifier
from moalign_plugins.rewards._models import model_directory

REGISTRATION = {
    "name": "ensemble",
    "class": "Ensemble",
    "summary": "several sequence classifiers: their mean, the worst of them, or the mean less their variance",
    "paper": "arXiv:2310.02743",
}
Combine = Literal["mean", "worst", "uncertainty"]


class Ensemble(FromClassifier):
    """The members' logits r_i of one head, combined: their mean; ``worst``, the smallest one (WCO); or
    ``uncertainty``, mean - lam * variance (UWO) with the population variance, whose divisor is the number of members.

    The members must be on one scale, such as members of one training from different seeds: the worst of several is
    otherwise the one with the lowest zero, and the variance is of their zeros. Equal members, and a single one, have
    variance 0. A sample that is too long for one member is not scored. As `sequence-classification` for each member:
    safetensors only, no remote code; a conversation goes through the chat template. arXiv 2310.02743.
    """

    paths: tuple[str, ...] = Field(min_length=1)
    """directories with config.json, model.safetensors and the tokenizer, one for each member"""
    combine: Combine = "worst"
    lam: float = Field(default=0.1, ge=0)
    """of ``uncertainty``: what a unit of variance costs; 0: nothing, the mean. In arXiv 2310.02743: 0.1 for training,
    0.5 for the choice of the best of many"""

    @field_validator("paths")
    @classmethod
    def _are_models(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            model_directory(path)
        return paths

    @model_validator(mode="after")
    def _lam_has_a_meaning(self) -> Ensemble:
        if "lam" in self.model_fields_set and self.combine != "uncertainty":
            raise ValueError(f"lam has no effect with 'combine: {self.combine}', only with 'combine: uncertainty'")
        return self

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        members = [self.logits(path, samples) for path in self.paths]
        found: list[float | None] = []
        for row in zip(*members, strict=True):
            known = [value for value in row if value is not None]
            found.append(combined(known, self.combine, self.lam) if len(known) == len(row) else None)
        return found


def combined(scores: Sequence[float], combine: Combine, lam: float) -> float:
    """Of one response's scores under the members; at least one."""
    mean = math.fsum(scores) / len(scores)
    if combine == "worst":
        return min(scores)
    if combine == "mean":
        return mean
    return mean - lam * math.fsum((score - mean) ** 2 for score in scores) / len(scores)

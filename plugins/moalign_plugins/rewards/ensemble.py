"""Several sequence classifiers that score together."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, field_validator

from moalign.api import Combining, Sample
from moalign_plugins.rewards._classifiers import FromClassifier
from moalign_plugins.rewards._models import model_directory

REGISTRATION = {
    "name": "ensemble",
    "class": "Ensemble",
    "summary": "several sequence classifiers: their mean, the worst of them, or the mean less their variance",
    "paper": "arXiv:2310.02743",
}


class Ensemble(Combining, FromClassifier):
    """The members' logits r_i of one head, combined: their mean; ``worst``, the smallest one (WCO); or
    ``uncertainty``, mean - lam * variance (UWO) with the population variance, whose divisor is the number of members.

    The members must be on one scale, such as members of one training from different seeds: the worst of several is
    otherwise the one with the lowest zero, and the variance is of their zeros. Equal members, and a single one, have
    variance 0. ``worst`` and ``uncertainty`` are for scores of which larger is better, so not for ``direction: min``. A
    sample that is too long for one member is not scored. As `sequence-classification` for each member:
    safetensors only, no remote code; a conversation goes through the chat template. arXiv 2310.02743.
    """

    paths: tuple[str, ...] = Field(min_length=1)
    """directories with config.json, model.safetensors and the tokenizer, one for each member"""

    @field_validator("paths")
    @classmethod
    def _are_models(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            model_directory(path)
        return paths

    def models(self) -> tuple[str, ...]:
        return self.paths

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        members = [self.logits(path, samples) for path in self.paths]
        found: list[float | None] = []
        for row in zip(*members, strict=True):
            known = [value for value in row if value is not None]
            found.append(self.combined(known) if len(known) == len(row) else None)
        return found

"""The logit of a sequence classifier, such as a reward model, from a directory in the transformers format."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import field_validator

from moalign.api import Sample
from moalign_plugins.rewards._classifiers import FromClassifier
from moalign_plugins.rewards._models import model_directory

REGISTRATION = {
    "name": "sequence-classification",
    "class": "SequenceClassification",
    "summary": "a logit of a Hugging Face sequence classifier (reward model) with one or several heads",
}


class SequenceClassification(FromClassifier):
    """The raw logit of one head. Safetensors only, no remote code, nothing is downloaded.

    A prompt that is a conversation goes through the tokenizer's chat template with the response as the assistant's
    message, whatever ``read`` says, unless that is ``response`` or ``tokens``. Objectives that name the same directory,
    device, dtype and way of reading share one model and, for the same samples, one pass.

    Of a model with code of its own only what transformers' classifier has is loaded, a linear head ``score.weight``. A
    model with any other weight, but the language model's own head, is refused with the weight's name: it would be left
    out. So is ArmoRM (arXiv 2406.12845): its ``regression_layer`` is such a head under another name, but its
    ``gating`` network, which mixes the heads by prompt, is not.

    A head that moalign trained points up: use it with ``direction: max``, whatever the direction was in training.
    """

    path: str
    """a directory with config.json, model.safetensors and the tokenizer"""

    @field_validator("path")
    @classmethod
    def _is_a_model(cls, path: str) -> str:
        return model_directory(path)

    def models(self) -> tuple[str, ...]:
        return (self.path,)

    def score(self, samples: Sequence[Sample]) -> list[float | None]:
        return self.logits(self.path, samples)

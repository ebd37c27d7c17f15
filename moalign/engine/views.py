"""Further sequences that a loss reads of each pair: those that it asks for, and a response of the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moalign import door
from moalign.api import Objective
from moalign.data.dataset import PairDataset
from moalign.data.tokenise import Tokeniser
from moalign.data.views import View, encoded, texts_of, with_views
from moalign.errors import PluginError
from moalign.types import Sample

if TYPE_CHECKING:
    from moalign.engine.reference_responses import Said

REFERENCE = "reference"
SAMPLED = "reference_responses"  # the need that brings this view


def asks(objective: Objective) -> bool:
    return type(objective).views is not Objective.views


def reads(objective: Objective) -> bool:
    return asks(objective) or SAMPLED in objective.wants


def asked(objective: Objective, dataset: PairDataset) -> list[Mapping[str, Sample]]:
    """What the loss asks for, pair by pair. Raises PluginError where that is no sample."""
    who = f"{door.origin(objective).who}, in views"
    found: list[Mapping[str, Sample]] = []
    for number, (chosen, rejected) in enumerate(texts_of(dataset)):
        views: Any = door.call(objective, "views", chosen, rejected, thorough=number == 0)
        if not isinstance(views, Mapping) or not all(
            isinstance(name, str) and isinstance(view, Sample) and isinstance(view.response, str)
            for name, view in views.items()
        ):
            raise PluginError(f"{who}: it must return samples (prompt and response) by name, not {views!r}")
        if REFERENCE in views:
            raise PluginError(f"{who}: '{REFERENCE}' is the name of responses of the reference; use another")
        found.append(dict(views))
    return found


def with_asked(objective: Objective, dataset: PairDataset, tokeniser: Tokeniser, max_length: int) -> PairDataset:
    """The pairs with what the loss asks for, which ``max_length`` tokens have room for. Raises as ``with_views``."""
    if not asks(objective):
        return dataset
    return with_views(dataset, encoded(dataset, asked(objective, dataset), tokeniser, max_length))


def with_responses(dataset: PairDataset, said: Sequence[Said]) -> PairDataset:
    """The pairs with what the reference has said to the prompt of each."""
    prompts = [dataset.samples[chosen].prompt for chosen in dataset.pairs[:, 0].tolist()]
    both = zip(prompts, said, strict=True)
    return with_views(dataset, [{REFERENCE: View(own.sequence, Sample(prompt, own.text))} for prompt, own in both])

"""Further sequences that a loss reads of each pair: asked for, or sampled from the reference, before any training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moalign import door
from moalign.api import Objective
from moalign.data.dataset import PairDataset
from moalign.data.views import View, encoded, texts_of, with_views
from moalign.errors import ConfigError, PluginError, TrainingError
from moalign.types import Sample

if TYPE_CHECKING:
    from moalign.engine.model import LanguageModel
    from moalign.sweeps.plan import Plan

REFERENCE = "reference"
SAMPLED = "reference_responses"  # the need that brings this view


def check(plan: Plan) -> None:
    """Raise ConfigError where the configuration has no pairs of the data, or leaves no place for views."""
    objective, name = plan.objective, plan.config.loss.name
    if not _asks(objective) and SAMPLED not in objective.wants:
        return
    if plan.config.rollouts is not None:
        raise ConfigError(
            f"rollouts: loss '{name}' reads further sequences beside each pair, which only pairs of the data have; "
            "leave rollouts out, or use another loss"
        )
    if _asks(objective) and plan.merges_judges:
        raise ConfigError(
            f"combine: '{plan.config.combine.name}' takes a pair both ways round, and loss '{name}' reads further "
            "sequences made for one of them; use another loss or another rule"
        )
    if plan.conditioner is not None:
        raise ConfigError(
            f"condition: loss '{name}' reads further sequences beside each pair, which tell no preference; leave "
            "condition out, or use another loss"
        )


def _asks(objective: Objective) -> bool:
    return type(objective).views is not Objective.views


def added(plan: Plan, dataset: PairDataset, model: LanguageModel, purpose: str) -> PairDataset:
    """The pairs with all views that the configuration's loss reads. ``purpose``: whose samples, "train" or another."""
    longest = plan.config.data.max_length
    if _asks(plan.objective):
        asked = _asked(plan.objective, dataset)
        dataset = with_views(dataset, encoded(dataset, asked, model.tokeniser, longest))
    if SAMPLED in plan.objective.wants:
        dataset = with_views(dataset, _sampled(plan, dataset, model, purpose))
    return dataset


def check_same(plan: Plan, objective: Objective, dataset: PairDataset) -> None:
    """Raise TrainingError where a candidate's options ask for other views than the configuration's, which there are."""
    if objective is plan.objective or not _asks(objective):
        return
    if _asked(objective, dataset) != _asked(plan.objective, dataset):
        raise TrainingError(
            "its changes of the loss's options ask for other views than those of the configuration, which all "
            "candidates share; leave these options out of the changes"
        )


def _asked(objective: Objective, dataset: PairDataset) -> list[Mapping[str, Sample]]:
    """What the loss asks for, pair by pair."""
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


def _sampled(plan: Plan, dataset: PairDataset, model: LanguageModel, purpose: str) -> list[dict[str, View]]:
    """A response of the untouched base to each pair's prompt, with evaluate's room for it: one for each prompt."""
    from moalign.engine.reference_responses import responses

    longest = plan.config.data.max_length - plan.config.evaluate.max_new_tokens
    first = [dataset.sequences[chosen] for chosen in dataset.pairs[:, 0].tolist()]
    prompts = [model.tokeniser.cut(sequence.prompt, longest) for sequence in first]
    distinct = list(dict.fromkeys(prompts))
    said = responses(model, distinct, plan.config.evaluate.max_new_tokens, plan.config.seed, purpose)
    of = dict(zip(distinct, said, strict=True))
    texts = [dataset.samples[chosen].prompt for chosen in dataset.pairs[:, 0].tolist()]
    return [
        {REFERENCE: View(of[prompt][0], Sample(text, of[prompt][1]))}
        for prompt, text in zip(prompts, texts, strict=True)
    ]

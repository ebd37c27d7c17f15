"""Further sequences that a loss reads of each pair: asked for, or sampled from the reference, before any training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign import door
from moalign.api import Objective
from moalign.data.dataset import PairDataset
from moalign.engine.views import SAMPLED, asked, asks, reads, with_asked, with_responses
from moalign.errors import ConfigError, PluginError, TrainingError

if TYPE_CHECKING:
    from moalign.engine.model import LanguageModel
    from moalign.sweeps.plan import Plan


def check(plan: Plan) -> None:
    """Raise ConfigError where the configuration leaves no place for views, PluginError where the loss has no pairs."""
    objective, name = plan.objective, plan.config.loss.name
    if not reads(objective):
        return
    if plan.grouped:
        raise PluginError(
            f"{door.origin(objective).who}: it learns from single responses, and further sequences stand beside pairs; "
            'its `needs` must have "pairs" or "margins"'
        )
    if asks(objective) and plan.merges_judges:
        raise ConfigError(
            f"combine: '{plan.config.combine.name}' takes a pair both ways round, and loss '{name}' reads further "
            "sequences made for one of them; use another loss or another rule"
        )
    if plan.conditioner is not None:
        raise ConfigError(
            f"condition: loss '{name}' reads further sequences beside each pair, which tell no preference; leave "
            "condition out, or use another loss"
        )


def added(plan: Plan, dataset: PairDataset, model: LanguageModel, purpose: str) -> PairDataset:
    """The pairs with all views that the configuration's loss reads. ``purpose``: whose samples, "train" or another.

    A response of the reference is one of the untouched base, with evaluate's room for it: one for each prompt.
    """
    longest = plan.config.data.max_length
    dataset = with_asked(plan.objective, dataset, model.tokeniser, longest)
    if SAMPLED not in plan.objective.wants:
        return dataset
    from moalign.engine.reference_responses import responses

    new = plan.config.evaluate.max_new_tokens
    first = [dataset.sequences[chosen] for chosen in dataset.pairs[:, 0].tolist()]
    prompts = [model.tokeniser.cut(sequence.prompt, longest - new) for sequence in first]
    said = responses(model, None, prompts, new, plan.config.seed, purpose)
    return with_responses(dataset, [said[prompt] for prompt in prompts])


def check_same(plan: Plan, objective: Objective, dataset: PairDataset) -> None:
    """Raise TrainingError where a candidate's options ask for other views than the configuration's, which there are."""
    if objective is plan.objective or not asks(objective):
        return
    if asked(objective, dataset) != asked(plan.objective, dataset):
        raise TrainingError(
            "its changes of the loss's options ask for other views than those of the configuration, which all "
            "candidates share; leave these options out of the changes"
        )

"""One model for many preferences in place of a candidate for each: what a plan makes of `condition`. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moalign import door
from moalign.api import Conditioner
from moalign.config import Config
from moalign.errors import ConfigError, PluginError, PreferenceError
from moalign.registry import Registry
from moalign.types import Candidate, Outcome, Preference

if TYPE_CHECKING:
    from moalign.sweeps.plan import Plan

MODEL = "model"  # the id of the one candidate that is trained


def conditioner_of(config: Config, registry: Registry) -> Conditioner | None:
    choice = config.condition
    if choice is None:
        return None
    return registry.build("conditioner", choice.name, choice.options, "condition", config.plugin_deadline)


def asked_of_model(candidates: Sequence[Candidate], plan: Plan, history: Sequence[Outcome]) -> list[Candidate]:
    """What the search proposed, whether trained or mixed, as questions to the one model, which is trained first.

    Raises PluginError where the search wants candidates to be trained each in its own way, PreferenceError for what no
    conditioner can say.
    """
    made = [_question(candidate, plan) for candidate in candidates]
    if not made or any(outcome.id == MODEL for outcome in history):
        return made
    equal = Preference("weights", dict.fromkeys(plan.objectives, 1 / len(plan.objectives)), "equal")
    return [Candidate(MODEL, equal), *made]


def _question(candidate: Candidate, plan: Plan) -> Candidate:
    who, choice = f"search '{plan.config.search.name}', candidate '{candidate.id}'", plan.config.condition
    assert choice is not None
    if candidate.parents or candidate.changes or candidate.id == MODEL:
        raise PluginError(
            f"{who}: with condition '{choice.name}' one model is trained and the search only asks it for preferences; "
            "this search wants candidates that are trained each in its own way. Use grid, random or listed"
        )
    if candidate.preference.kind == "thresholds":
        raise PreferenceError(f"{candidate.id}: condition '{choice.name}' knows weights and directions, no thresholds")
    return replace(candidate, parents=(MODEL,), mixed=False, conditioned=True)


def check(plan: Plan) -> None:
    """Raise ConfigError where the conditioner, and what else the configuration names, do not go together."""
    conditioner, choice = plan.conditioner, plan.config.condition
    if conditioner is None or choice is None:
        return
    key, config = f"condition: '{choice.name}'", plan.config
    door.call(conditioner, "check", config.model.lora.r, plan.objectives)
    if conditioner.angles is not None and len(plan.objectives) != 2:
        raise ConfigError(f"condition.angles: an angle needs exactly two objectives, there are {len(plan.objectives)}")
    if conditioner.angles is not None and not (plan.scored or plan.grouped):
        raise ConfigError("condition.angles: a judgement of a pair has no direction; use a loss on rewards")
    if conditioner.tells_rewards and not plan.grouped:
        raise ConfigError(
            f"{key} tells a response its own rewards, so that no two have one prompt and can be compared; use a loss "
            "that takes sampled responses one by one: `moalign plugins list --kind objective`"
        )
    if config.train.early_stop is not None:
        raise ConfigError(f"train.early_stop: {key} trains for many preferences, and none decides; leave it out")
    if config.train.posterior is not None:
        raise ConfigError(f"train.posterior: {key} trains one model, and no two posteriors to combine; leave it out")
    if apart := plan.objective.wants & {"token_advantages", "hidden", "greedy"}:
        raise ConfigError(
            f"{key} does not go with loss '{config.loss.name}', which needs {' and '.join(sorted(apart))}; use another "
            "loss: `moalign plugins list --kind objective`"
        )
    equal = Preference("weights", dict.fromkeys(plan.objectives, 1 / len(plan.objectives)))
    if plan.combiner.needs_gram or door.call(plan.combiner, "init", equal):
        raise ConfigError(
            f"{key} does not go with combine '{config.combine.name}', which adapts to one preference while it trains; "
            "use a rule without a state: `moalign plugins list --kind combiner`"
        )
    if conditioner.by != "text" and config.rollouts is not None and config.rollouts.sampler is not None:
        how = "gates the adapter" if conditioner.by == "gates" else "has vectors in the place of tokens"
        raise ConfigError(
            f"rollouts.sampler: {key} {how} for each prompt, which only moalign's own sampling does; leave it out, or "
            "use a conditioner that speaks in text"
        )
    if config.data.margins == "implicit":
        raise ConfigError(f"data.margins: {key} trains no one-hot candidates whose adapters could be the rewards")

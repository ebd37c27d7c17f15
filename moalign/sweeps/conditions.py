"""One model for many preferences in place of a candidate for each: what a plan makes of `condition`. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from moalign import door, preference
from moalign.api import Combiner, Conditioner
from moalign.config import Config
from moalign.errors import ConfigError, PluginError, PreferenceError
from moalign.registry import Registry
from moalign.types import Candidate, Outcome, Preference

if TYPE_CHECKING:
    from moalign.sweeps.plan import Plan

MODEL = "model"  # the id of the one candidate that is trained
TRIED = 20  # drawn preferences that the combiner is asked about


def conditioner_of(config: Config, registry: Registry) -> Conditioner | None:
    choice = config.condition
    if choice is None:
        return None
    return registry.build("conditioner", choice.name, choice.options, "condition", config.plugin_deadline)


def seen(history: Sequence[Outcome], plan: Plan) -> tuple[Outcome, ...]:
    """What a search sees: its own candidates alone, so not the one model that it did not propose."""
    return tuple(outcome for outcome in history if plan.conditioner is None or outcome.id != MODEL)


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
    if candidate.parents or candidate.shares or candidate.changes or candidate.id == MODEL:
        raise PluginError(
            f"{who}: with condition '{choice.name}' one model is trained and the search only asks it for preferences; "
            "this search wants candidates that are trained or mixed each in its own way. Use another one: "
            "`moalign plugins list --kind search`"
        )
    if candidate.preference.kind == "direction" and plan.conditioner is not None and plan.conditioner.by != "text":
        raise PreferenceError(
            f"{candidate.id}: condition '{choice.name}' is told weights that sum to 1 and no directions; text can tell "
            "them: `moalign plugins list --kind conditioner`"
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
    if conditioner.angles is not None and not (plan.scored or plan.grouped or plan.labels_rounds):
        raise ConfigError("condition.angles: a judgement of a pair has no direction; use a loss on rewards")
    if conditioner.angles is not None and conditioner.by != "text":
        raise ConfigError(
            f"condition.angles: {key} is told weights that sum to 1, and a direction has length 1; leave angles out, "
            "or use a conditioner that speaks in text"
        )
    if conditioner.angles is not None and "concentration" in conditioner.model_fields_set:
        raise ConfigError("condition.concentration: of weights, and with angles directions are drawn; leave one out")
    if config.rollouts is None and "per_prompt" in conditioner.model_fields_set:
        raise ConfigError(
            "condition.per_prompt: of a round of sampled responses, and there are no rollouts; leave it out"
        )
    if conditioner.tells_rewards and (own := plan.objective.wants & {"old_logps", "reference"}):
        raise ConfigError(
            f"{key} trains a response behind other rewards than those that asked for it, and loss '{config.loss.name}' "
            f"compares it with the policy that sampled it (it needs {' and '.join(sorted(own))}); use a loss that only "
            "makes responses likelier: `moalign plugins list --kind objective`"
        )
    if conditioner.tells_rewards and not plan.grouped:
        raise ConfigError(
            f"{key} tells a response its own rewards, so that no two have one prompt and can be compared; use a loss "
            "that takes sampled responses one by one: `moalign plugins list --kind objective`"
        )
    if config.train.early_stop is not None:
        raise ConfigError(f"train.early_stop: {key} trains for many preferences, and none decides; leave it out")
    if config.train.posterior is not None:
        raise ConfigError(f"train.posterior: {key} trains one model, and no two posteriors to combine; leave it out")
    if plan.grouped and config.rollouts is None and not conditioner.tells_rewards:
        raise ConfigError(
            f"{key} asks for drawn preferences, and without rollouts loss '{config.loss.name}' has one answer of the "
            "combiner for all responses of the data; add rollouts, use a loss on pairs, or a conditioner that tells a "
            "response its own rewards"
        )
    if apart := plan.objective.wants & {"token_advantages", "hidden", "greedy", "mismatched", "distributions"}:
        raise ConfigError(
            f"{key} does not go with loss '{config.loss.name}', which needs {' and '.join(sorted(apart))}; use another "
            "loss: `moalign plugins list --kind objective`"
        )
    equal = Preference("weights", dict.fromkeys(plan.objectives, 1 / len(plan.objectives)))
    drawn = _drawn(conditioner, plan.objectives)
    _check_rule(plan, [equal, *drawn], key)
    if plan.combiner.needs_gram or plan.weighs_losses or _follows_one(plan.combiner, [equal, *drawn]):
        raise ConfigError(
            f"{key} does not go with combine '{config.combine.name}', which adapts to one preference while it trains; "
            "use another rule: `moalign plugins list --kind combiner`"
        )
    if conditioner.by != "text" and config.rollouts is not None and config.rollouts.sampler is not None:
        how = "gates the adapter" if conditioner.by == "gates" else "has vectors in the place of tokens"
        raise ConfigError(
            f"rollouts.sampler: {key} {how} for each prompt, which only moalign's own sampling does; leave it out, or "
            "use a conditioner that speaks in text"
        )
    if config.data.margins == "implicit":
        raise ConfigError(f"data.margins: {key} trains no one-hot candidates whose adapters could be the rewards")


def _drawn(conditioner: Conditioner, objectives: tuple[str, ...]) -> list[Preference]:
    """Some of those that it will be trained on. Raises PluginError where it draws what is none."""
    rng, found = Random(0), []
    for _ in range(TRIED):
        drawn = door.call(conditioner, "draw", objectives, rng)
        try:
            found.append(preference.parse(drawn, objectives))
        except PreferenceError as error:
            raise PluginError(f"{door.origin(conditioner).who}, in draw: it drew no preference: {error}") from None
    return found


def _check_rule(plan: Plan, wanted: Sequence[Preference], key: str) -> None:
    """Raise ConfigError where the combiner has no meaning for what is drawn."""
    for each in wanted:
        try:
            door.call(plan.combiner, "check", each)
        except PreferenceError as error:
            raise ConfigError(
                f"{key} draws preferences that combine '{plan.config.combine.name}' refuses: {error}"
            ) from None


def _follows_one(combiner: Combiner, wanted: Sequence[Preference]) -> bool:
    """Whether the combiner's state, or what it multiplies all advantages by, is that of one preference."""
    first, *others = [door.call(combiner, "init", each) for each in wanted]
    return type(combiner).multiplier is not Combiner.multiplier or any(other != first for other in others)

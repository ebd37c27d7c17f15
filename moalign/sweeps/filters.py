"""The filter of sampled responses that a configuration names, and what it does not go with. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign import door
from moalign.api import Filter
from moalign.config import Config
from moalign.errors import ConfigError
from moalign.registry import Registry

if TYPE_CHECKING:
    from moalign.sweeps.plan import Plan


def filter_of(config: Config, registry: Registry) -> Filter | None:
    choice = None if config.rollouts is None else config.rollouts.filter
    if choice is None:
        return None
    return registry.build("filter", choice.name, choice.options, "rollouts.filter", config.plugin_deadline)


def check(plan: Plan) -> None:
    """Raise ConfigError where the filter would have nothing to choose among, or no combined reward to look at."""
    rollouts = plan.config.rollouts
    if plan.filter is None or rollouts is None or rollouts.filter is None:
        return
    name, loss = rollouts.filter.name, plan.config.loss.name
    if plan.filter.has("keep_pairs") and not plan.filter.has("keep_responses") and not plan.labels_rounds:
        raise ConfigError(
            f"rollouts.filter: '{name}' chooses among labelled pairs of responses, and loss '{loss}' has none; use a "
            "filter of responses, or a loss on labelled pairs"
        )
    if plan.scored and "groups" not in plan.combiner.accepts:
        raise ConfigError(
            f"rollouts.filter: combine '{plan.config.combine.name}' has no combined reward of a single response, which "
            "a filter looks at; use another rule, or leave the filter out"
        )
    door.call(plan.filter, "check", plan.objectives)

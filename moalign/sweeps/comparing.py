"""The policy that losses compare with, as a plan has it, and what does not go with it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moalign import door
from moalign.api import Reference
from moalign.config import Config
from moalign.errors import ConfigError, PluginError
from moalign.registry import Registry
from moalign.sweeps.checks import finite

if TYPE_CHECKING:
    from moalign.sweeps.plan import Plan


def reference_of(config: Config, registry: Registry) -> Reference | None:
    choice = config.reference
    if choice is None:
        return None
    return registry.build("reference", choice.name, choice.options, "reference", config.plugin_deadline)


def adapters_of(reference: Reference) -> dict[str, float]:
    """Folder -> how much of it a reference begins with. Raises PluginError where it says something else."""
    found = door.call(reference, "adapters")
    good = isinstance(found, Mapping) and all(isinstance(path, str) for path in found)
    if not good or not all(finite(share) for share in found.values()):
        raise PluginError(f"{door.origin(reference).who}, in adapters: it must return numbers by folder, not {found!r}")
    return {path: float(share) for path, share in sorted(found.items()) if share}


def is_base(reference: Reference) -> bool:
    """Whether it is what a configuration that is silent gets."""
    return reference.fixed and not adapters_of(reference)


def check(plan: Plan) -> None:
    """Raise ConfigError where the reference, and what else the configuration names, do not go together."""
    reference, choice = plan.reference, plan.config.reference
    if reference is None or choice is None:
        return
    door.call(reference, "check", plan.config.rollouts is not None)
    if is_base(reference):
        return
    key, loss = f"reference: '{choice.name}'", plan.config.loss.name
    if "reference" not in plan.objective.wants:
        raise ConfigError(
            f"{key} would be read by nobody: loss '{loss}' compares with no reference; leave it out, or use a loss "
            "that does: `moalign plugins list --kind objective`"
        )
    if "reference_responses" in plan.objective.wants and plan.config.rollouts is None:
        raise ConfigError(
            f"{key} does not go with loss '{loss}', whose responses of the reference are those of the untouched base, "
            "sampled before training; add rollouts, which ask the reference in each round, or leave reference out"
        )
    if plan.config.condition is not None:
        raise ConfigError(
            f"{key} does not go with condition: one model is trained for many preferences there, and all of them are "
            "held to the base; leave one of the two out"
        )
    if not reference.fixed and plan.config.train.early_stop is not None:
        raise ConfigError(
            f"train.early_stop: with {key} the held-out loss is another function whenever the reference moves, and "
            "looks cannot be compared; leave it out"
        )
    if not reference.fixed and plan.config.data.margins == "implicit":
        raise ConfigError(f"data.margins: {implicit(plan)}")


def adapters_kept(plan: Plan) -> float:
    """How many adapters of the run's rank each candidate's reference takes in memory, at the most."""
    if plan.reference is None or plan.reference.fixed:
        return 0.0
    rank = door.call(plan.reference, "largest_rank")
    return max(1.0, (rank or 0) / plan.config.model.lora.r)


def implicit(plan: Plan) -> str:
    """Why there are no implicit rewards beside a reference that moves."""
    name = plan.config.reference.name if plan.config.reference is not None else ""
    return (
        "an implicit reward is a log-ratio to the reference that its adapter was trained with, and reference: "
        f"'{name}' moves; give scores in the data, or objectives.NAME.reward"
    )

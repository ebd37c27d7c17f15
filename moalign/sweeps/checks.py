"""What of a configuration does not go together, refused before a model is loaded. Imports no torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moalign import door
from moalign.api import Transform
from moalign.config import BUILT_IN_MODEL, Config, Shared
from moalign.errors import ConfigError, ModelError, PluginError
from moalign.sweeps import guides, views
from moalign.types import Candidate, Outcome

if TYPE_CHECKING:
    from moalign.sweeps.plan import Plan

BESIDE_ADVANTAGES = frozenset({"token_advantages", "hidden", "distributions", "mismatched", "rewards", "base"})
UNITS = {"labelled": "labelled pairs", "scored": "scored pairs", "groups": "groups of responses"}
OF_SAMPLES = {"old_logps", "token_advantages", "greedy"}  # what a loss may need and only rollouts have


def check(plan: Plan) -> None:
    """Raise ConfigError where parts of the configuration contradict each other."""
    _check_reference_point(plan.config)
    _check_rewards(plan)
    _check_transforms(plan)
    _check_early_stop(plan)
    guides.check(plan)
    views.check(plan)


def check_files(config: Shared) -> None:
    """Raise ConfigError or ModelError where a file or the model's directory is not there."""
    for key, path in zip(("data.path", "data.held_out_path"), config.data_paths, strict=True):
        if path is not None and not Path(path).exists():
            near = difflib.get_close_matches(Path(path).name, _names_in(Path(path).parent), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{key}: no such file: {path}{hint}")
    directory = Path(config.model_directory)
    if directory.is_absolute() or config.model.path == BUILT_IN_MODEL:
        if not directory.exists():
            raise ModelError(f"model.path: no such directory: {directory}")
        if not (directory / "config.json").exists():
            raise ModelError(f"model.path: {directory} has no config.json; it is not in the transformers format")


def _names_in(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir()] if directory.is_dir() else []


def transform_key(objective: str, place: int) -> str:
    return f"objectives.{objective}.transform.{place}"


def references_of(transform: Transform) -> int:
    """How many of the base's responses to each prompt it compares with."""
    count = door.call(transform, "references")
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise PluginError(f"{door.origin(transform).who}, in references: it must return a count, not {count!r}")
    return count


def _check_reference_point(config: Config) -> None:
    point = config.evaluate.reference_point
    if isinstance(point, dict) and set(point) != set(config.objectives):
        raise ConfigError(
            f"evaluate.reference_point: has {', '.join(sorted(point)) or 'nothing'}, "
            f"must have one number for each of {', '.join(config.objective_names)}"
        )


def _check_rewards(plan: Plan) -> None:
    config = plan.config
    kind = "groups" if plan.grouped or plan.labels_rounds else "scored" if plan.scored else "labelled"
    if config.rollouts is not None and not plan.labels_rounds:
        for key, default in (("pairs", "all"), ("gap", 0.0)):
            if getattr(config.rollouts, key) != default:
                raise ConfigError(
                    f"rollouts.{key}: of losses on labelled pairs, and loss '{config.loss.name}' takes all sampled "
                    "responses as they are; leave it out"
                )
    if plan.grouped and config.rollouts is None:
        _check_without_rollouts(plan)
    if plan.grouped and config.rollouts is not None:
        for key in ("temperature", "top_p"):
            if getattr(config.rollouts, key) != 1.0:
                name = config.loss.name
                raise ConfigError(
                    f"rollouts.{key}: loss '{name}' follows the policy's own distribution, so it must be 1"
                )
    if "old_logps" in plan.objective.wants and config.model.lora.dropout:
        raise ConfigError(
            f"model.lora.dropout: loss '{config.loss.name}' compares the policy with itself when it sampled, where "
            "nothing is dropped; their ratio would be noise, so it must be 0"
        )
    accepted = sorted(plan.combiner.accepts)
    if kind not in accepted:
        what = "pairs of sampled responses, which their combined rewards label" if plan.labels_rounds else UNITS[kind]
        raise ConfigError(
            f"combine: '{config.combine.name}' works on {' and '.join(UNITS[each] for each in accepted)}, "
            f"but loss '{config.loss.name}' trains on {what}; use another loss or another rule: "
            "`moalign plugins list --kind combiner`"
        )
    _check_gram(plan)
    by_rewards = plan.grouped or plan.labels_rounds
    if not by_rewards and not plan.objective.shiftable and plan.mixing_needs_margins:
        raise ConfigError(
            f"combine: '{config.combine.name}' works through scale and margin of a pairwise logit, and loss "
            f"'{config.loss.name}' has none; use another loss, or a rule that only weighs pairs: "
            "`moalign plugins list --kind combiner`"
        )
    if "greedy" in plan.objective.wants and not plan.combiner.pointwise:
        raise ConfigError(
            f"combine: '{config.combine.name}' compares responses with each other, and loss '{config.loss.name}' with "
            "the greedy response to the prompt, which is none of them; use another loss or another rule: "
            "`moalign plugins list --kind combiner`"
        )
    without = [name for name in plan.objectives if name not in plan.rewards]
    reason = None
    if config.rollouts is not None:
        reason = "rollouts: sampled responses must be scored"
    elif config.evaluate.kind == "generate":
        reason = "evaluate.kind: generate scores sampled responses"
    elif config.data.margins == "reward":
        reason = "data.margins: reward asks the reward plugins"
    if reason and without:
        raise ConfigError(f"{reason}, but objectives.{without[0]} has no reward; add objectives.{without[0]}.reward")
    _check_mismatched(plan)
    if (plan.scored or (plan.grouped and config.rollouts is None)) and config.data.margins == "implicit":
        raise ConfigError(f"data.margins: loss '{config.loss.name}' regresses on rewards; implicit ones are not enough")
    if plan.reads_levels and config.data.margins == "implicit":
        raise ConfigError(f"data.margins: {no_levels(plan)}")


def doubt(plan: Plan) -> str | None:
    """What a user should know of search and combiner together, though they run."""
    if len(plan.objectives) == 1 or plan.combiner.weighted_sums or not plan.search.supposes_weighted_sums:
        return None
    search, combine = plan.config.search.name, plan.config.combine.name
    return (
        f"search '{search}' supposes that the policy trained for weights has the largest weighted sum of the rewards, "
        f"which combine '{combine}' does not train for: it may end early, far from the best; `grid` supposes nothing"
    )


def no_levels(plan: Plan) -> str:
    """Why there are no implicit rewards for a combiner that reads more than their differences."""
    return (
        f"combine '{plan.config.combine.name}' reads the rewards themselves, and an implicit reward, which is a "
        "log-ratio, is known but for a number for each prompt; give scores in the data, or objectives.NAME.reward, or "
        "use a rule that reads differences alone: `moalign plugins list --kind combiner`"
    )


def _check_without_rollouts(plan: Plan) -> None:
    """Of a loss on single responses, which are then those that the data has, and nobody knows who wrote them."""
    name, combine = plan.config.loss.name, plan.config.combine.name
    if lacking := plan.objective.wants & OF_SAMPLES:
        raise ConfigError(
            f"loss: '{name}' learns from responses that the policy samples; add rollouts: it needs "
            f"{' and '.join(sorted(lacking))}, which responses in the data do not have"
        )
    if plan.combiner.needs_gram:
        raise ConfigError(
            f"combine: '{combine}' reads inner products of the objectives' gradients at every round of responses that "
            "the policy samples; add rollouts, or use another rule"
        )


def _check_gram(plan: Plan) -> None:
    """A rule that reads inner products of gradients needs a loss that has one of each objective, on sampled responses.

    On labelled pairs of the data each step has them from its own backward passes.
    """
    if not plan.combiner.needs_gram or not (plan.grouped or plan.labels_rounds):
        return
    apart, why = plan.objective.wants & BESIDE_ADVANTAGES, ""
    if plan.labels_rounds:
        why = "learns from pairs that are labelled before any gradient is known"
    elif "token_advantages" in apart:
        why = "weighs each token"
    elif apart:
        why = f"reads {min(apart)}"
    elif not plan.objective.linear:
        why = "has a response's loss depend on others, or on its advantage otherwise"
    if why:
        raise ConfigError(
            f"combine: '{plan.config.combine.name}' reads inner products of the objectives' gradients, which are found "
            "only where the advantage of a whole response is a factor of its loss, but loss "
            f"'{plan.config.loss.name}' {why}; use another loss or another rule"
        )


def _check_mismatched(plan: Plan) -> None:
    """A step needs two prompts where responses to one are compared with those to another."""
    if "mismatched" not in plan.objective.wants:
        return
    rollouts, name = plan.config.rollouts, plan.config.loss.name
    keys = {"train.pairs_per_step": plan.config.train.pairs_per_step}
    if rollouts is not None:
        keys = {"rollouts.prompts": rollouts.prompts, "rollouts.prompts_per_step": rollouts.prompts_per_step}
    for key, value in keys.items():
        if value < 2:
            raise ConfigError(f"{key}: loss '{name}' compares with responses to other prompts of the step; 2 at least")


def _check_transforms(plan: Plan) -> None:
    """They shape rewards of single or sampled responses, and the base's must come to a comparison in the same shape."""
    for name, chain in plan.transforms.items():
        if plan.config.rollouts is None and not plan.grouped:
            raise ConfigError(
                f"objectives.{name}.transform: transforms shape the rewards of responses that the policy samples; add "
                "rollouts, or leave it out"
            )
        compares = [place for place, each in enumerate(chain) if plan.config.rollouts is None and references_of(each)]
        if compares:
            choice = plan.config.objectives[name].transform[compares[0]]
            raise ConfigError(
                f"{transform_key(name, compares[0])}: '{choice.name}' compares with responses of the base, which only "
                "rollouts sample; add rollouts, or leave it out"
            )
        names = [choice.name for choice in plan.config.objectives[name].transform]
        for place, transform in enumerate(chain):
            if "greedy" in plan.objective.wants and not transform.pointwise:
                raise ConfigError(
                    f"{transform_key(name, place)}: what '{names[place]}' gives a response depends on others, and loss "
                    f"'{plan.config.loss.name}' compares with the greedy response to the prompt, which is none of them"
                )
            unfit = [i for i, each in enumerate(chain[:place]) if not each.pointwise or references_of(each)]
            if references_of(transform) and unfit:
                raise ConfigError(
                    f"{transform_key(name, place)}: '{names[place]}' compares with the base's responses, but what "
                    f"'{names[unfit[0]]}' before it gives a response is relative to others already, and the two would "
                    "not be on one scale; put it first"
                )


def _check_early_stop(plan: Plan) -> None:
    """An early stop needs held-out pairs that are judged as the training pairs are."""
    reason = None
    if plan.config.rollouts is not None:
        reason = "rollouts trains on fresh samples of the policy, and no held-out pair is like them"
    elif plan.scored:
        name = plan.config.loss.name
        reason = f"loss '{name}' learns from reward differences of any responses, and held-out pairs are labelled ones"
    elif plan.weighs_losses:
        name = plan.config.combine.name
        reason = f"combine '{name}' weighs the losses anew in each step, so that no two looks are on one scale"
    if reason and plan.config.train.early_stop is not None:
        raise ConfigError(
            f"train.early_stop: {reason}; leave it out, or use a loss on labelled pairs with fixed weights"
        )


def check_shares(candidate: Candidate, done: Collection[str], who: str) -> None:
    """Raise PluginError unless its shares are finite numbers, not all 0, for finished candidates."""
    if not isinstance(candidate.shares, Mapping):
        raise PluginError(f"{who} with the shares {candidate.shares!r}; they are numbers by the ids of candidates")
    numbers = {name: share if isinstance(share, tuple) else (share,) for name, share in candidate.shares.items()}
    if candidate.parents:
        raise PluginError(f"{who} with a parent and with shares; it starts from one of the two")
    if unknown := [name for name in numbers if name not in done]:
        raise PluginError(f"{who} mixed from '{unknown[0]}', which is not done")
    if not all(share and all(map(finite, share)) for share in numbers.values()):
        given = dict(candidate.shares)
        raise PluginError(f"{who} with the shares {given}; each is a finite number, or a tuple of them, one per block")
    if not any(map(any, numbers.values())):
        raise PluginError(f"{who} with shares that are all 0, which is the base itself; give one that is not")


def finite(number: object) -> bool:
    """Whether it is a number that JSON keeps, and a float can hold."""
    if not isinstance(number, int | float) or isinstance(number, bool):
        return False
    return abs(number) <= sys.float_info.max  # no isfinite: it fails on a large int


def check_start(candidate: Candidate, history: Sequence[Outcome], plan: Plan, who: str) -> None:
    """Raise PluginError where training would start from an adapter that has not the configuration's rank and alpha,
    which the record then would not tell. What is only mixed may come from any."""
    if candidate.kind != "trained":
        return
    different: set[str] = set()
    for outcome in history:
        mixed_so = outcome.kind != "trained" and not different.isdisjoint(outcome.parents)
        if mixed_so or _has_another_shape(outcome, plan):
            different.add(outcome.id)
    for parent in (*candidate.parents, *candidate.shares):
        if parent in different:
            raise PluginError(
                f"{who} to start from '{parent}', which has another rank or alpha than the configuration's model.lora; "
                "start from fresh weights, or from a candidate without such changes"
            )


def _has_another_shape(outcome: Outcome, plan: Plan) -> bool:
    changed = outcome.kind == "trained" and any(key.startswith("model.lora.") for key in outcome.changes)
    return changed and plan.variant(outcome.changes).lora != plan.config.model.lora

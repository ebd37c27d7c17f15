"""What ``moalign evaluate --json`` prints: the answers of all diagnostics about one run, None where there is none."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moalign import lora
from moalign.api import Reference
from moalign.diagnostics import along, gradients, policies
from moalign.diagnostics import material as materials
from moalign.diagnostics.conflict import cosines
from moalign.diagnostics.material import Material, Rewards
from moalign.diagnostics.measurement import BASE, Reading, readings
from moalign.diagnostics.question import Question
from moalign.engine.model import LanguageModel
from moalign.errors import ConfigError, PluginError
from moalign.registry import Registry
from moalign.sweeps import side_by_side, steering
from moalign.sweeps.archive import Archive
from moalign.sweeps.changes import variant

log = logging.getLogger(__name__)

Said = Callable[[str], None]


def evaluate(directory: Path, registry: Registry, question: Question, say: Said = lambda phase: None) -> dict[str, Any]:
    """All figures that the run, its data and its rewards give; ``missing`` says in words what is not there.

    ``say`` is told what takes a while. Rewards are those that ``run.json`` names, with the options that stand there,
    but for those of the question. Raises RunError for an unknown candidate or another base, UserError where the
    question does not go together, DataError, PluginError where a reward fails, CorruptFileError.
    """
    archive = Archive.open(directory)
    chosen = (
        archive.finished() if question.candidate is None else tuple(archive.of_candidate(question.candidate).shares)
    )
    rewards = materials.rewards(archive.config, question, registry, log.warning)
    question.check(archive.config.objective_names, rewards.names)
    found: dict[str, Any] = {
        "objectives": list(archive.config.objective_names),
        "rewards": rewards.names,
        "gold": question.gold,
        "proxies": question.proxies(rewards.names),
        "candidates": list(chosen),
        "policies": {},
        "missing": list(rewards.missing),
    }
    if not rewards.scorers:
        found["missing"].append(
            "no objective has a reward: nothing is said of rewards; give one by --reward NAME=PLUGIN"
        )
    why = materials.absent(archive, question)
    if why is None and (how := steering.told_in_prompt(archive)):
        why = f"the model of this run is told its preference {how}, so that its policies were not run"
    if why is None:
        found |= _of_policies(archive, chosen, registry, question, rewards, found["missing"], say)
    else:
        found["missing"].append(why)
    found |= along.of_run(archive, chosen, found)
    return _plain(found)


def _of_policies(
    archive: Archive,
    chosen: tuple[str, ...],
    registry: Registry,
    question: Question,
    rewards: Rewards,
    missing: list[str],
    say: Said,
) -> dict[str, Any]:
    """Load the model, run every policy, ask each diagnostic."""
    config = archive.config
    say("loading the model")
    model, slots = side_by_side.load(archive, chosen, question.base, steering.place(question.device))
    say("reading the data")
    material = materials.gather(archive, question, registry, model.tokeniser)
    missing += material.missing
    if (name := _other_reference(archive, registry)) is not None:
        missing.append(
            "log-ratios and gradients are relative to the untouched base; the run's loss compared with reference "
            f"'{name}'"
        )
    say("running the policies")
    settings = config.evaluate
    if question.samples is not None:
        settings = settings.model_copy(update={"samples": question.samples})
    seed = config.seed if question.seed is None else question.seed
    read = readings(model, slots, material, rewards, settings, seed)
    explicit = {} if material.pairs is None else {name: material.scored(each) for name, each in rewards.scorers.items()}
    conflicts: dict[str, Any] = {}
    if len(config.objective_names) > 1:
        say("taking gradients")
        conflicts = _conflicts(archive, model, slots, registry, material.with_rewards(explicit), read, missing)
    told = {
        name: policies.of_policy(each, read[BASE], material.pairs, explicit, rewards.names, question)
        | {"conflict": conflicts.get(name)}
        for name, each in read.items()
    }
    return {
        "pairs": policies.of_pairs(material, read[BASE], question),
        "samples": None
        if read[BASE].sampled is None
        else {"of_prompts": len(material.asked), "each": settings.samples, "temperature": 1.0, "from": material.source},
        "left_out": dict(material.counts),
        "policies": told,
    }


def _other_reference(archive: Archive, registry: Registry) -> str | None:
    """The name of the run's reference where it is not the base. The plugin is looked at, and not built."""
    choice = archive.config.reference
    if choice is None:
        return None
    try:
        kind = registry.load(registry.find("reference", choice.name))
        stays = issubclass(kind, Reference) and kind.fixed
    except PluginError:  # gone since; the base is moalign's own
        stays = False
    return None if stays and not archive.record.get("reference") else choice.name


def _conflicts(
    archive: Archive,
    model: LanguageModel,
    slots: Mapping[str, str],
    registry: Registry,
    material: Material,
    read: Mapping[str, Reading],
    missing: list[str],
) -> dict[str, Any]:
    """By id; the base has no adapter, and so no gradient. Why there is none for all is said once, else with the ids of
    those that have none."""
    config = archive.config
    try:
        loss = registry.build("objective", config.loss.name, config.loss.options, "loss", config.plugin_deadline)
    except (PluginError, ConfigError) as error:
        missing.append(f"no conflict matrix: {error}")
        return {}
    stack = lora.stack(model.policy, list(slots.values()))
    changes = {outcome.id: outcome.changes for outcome in archive.history}
    found: dict[str, Any] = {}
    without: dict[str, list[str]] = {}
    for name, slot in slots.items():
        about = (config.objective_names, material.pairs, read[name].sampled, material.prompts, name)
        products = None
        try:
            own = variant(config, loss, changes[name]).objective
            on = gradients.unsupplied(own, config, model.width)
            if on is None:
                products, on = gradients.products(model, stack, slot, own, *about)
        except (PluginError, ConfigError) as error:
            on = f"no conflict matrix: {error}"
        if products is None:
            without.setdefault(on, []).append(name)
            continue
        found[name] = {
            "cosines": cosines(products).tolist(),
            "norms": [math.sqrt(x) for x in products.diagonal()],
            "on": on,
        }
    for why, names in without.items():
        missing.append(why if len(names) == len(slots) else f"{', '.join(names)}: {why}")
    return found


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """As strict JSON gives it back, with None for what is not finite."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else None
        return value

    cleaned: dict[str, Any] = json.loads(json.dumps(plain(found), allow_nan=False))
    return cleaned

"""Frozen adapters that a loss reads beside its reference: looked for before a model is loaded, then loaded once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign import door, storage
from moalign.api import Objective
from moalign.errors import ConfigError, MoalignError, PluginError

if TYPE_CHECKING:
    from moalign.engine.model import LanguageModel
    from moalign.engine.reference_policy import FrozenPolicy
    from moalign.sweeps.plan import Plan

FILES = ("adapter_config.json", "adapter_model.safetensors")


def folders_of(objective: Objective) -> dict[str, Path]:
    """The folders that the loss names, by option. Raises PluginError where it names something else."""
    found: Any = door.call(objective, "guides")
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        who = door.origin(objective).who
        raise PluginError(f"{who}, in guides: it must return folders by name, not {found!r}")
    return {name: Path(path).expanduser() for name, path in sorted(found.items())}


def in_measure(objective: Objective) -> bool:
    """Whether the log-probabilities under them are known once for a round, where the loss measures it."""
    return "token_advantages" in objective.wants and type(objective).measure is not Objective.measure


def in_loss(objective: Objective) -> bool:
    """Whether each step needs them: their log-probabilities, or the whole of what they say."""
    return not in_measure(objective) or "distributions" in objective.wants


def check(plan: Plan) -> None:
    """Raise ConfigError where a folder holds no adapter, or the configuration leaves no place for one."""
    folders, name = folders_of(plan.objective), plan.config.loss.name
    for option, folder in folders.items():
        check_folder(option, folder)
    if folders and plan.conditioner is not None:
        raise ConfigError(
            f"condition: loss '{name}' reads another policy, which was not told the preferences that the prompts or "
            "vectors of a conditioner tell; leave condition out, or use another loss"
        )
    if folders and plan.combiner.needs_gram and plan.grouped:
        raise ConfigError(
            f"combine: '{plan.config.combine.name}' reads inner products of the objectives' gradients, which are found "
            f"without other policies, and loss '{name}' reads one; use another loss or another rule"
        )


def check_folder(option: str, folder: Path) -> None:
    """Raise ConfigError naming the option where the folder holds no adapter."""
    for file in FILES:
        if not (folder / file).is_file():
            raise ConfigError(
                f"loss.{option}: no {file} in {folder}; give the folder of an adapter of the same base model, such as "
                "RUN/candidates/ID of a run that has ended"
            )


def load(option: str, folder: Path, slot: str, model: LanguageModel) -> FrozenPolicy:
    """The adapter in a slot of its own, which has the adapter's rank. Raises ConfigError naming the option."""
    from moalign import lora
    from moalign.engine.reference_policy import FrozenPolicy

    check_folder(option, folder)
    try:
        config = storage.read_json(folder / lora.CONFIG_FILE)
        rank = config.get("r") if isinstance(config, Mapping) else None
        lora.add_slots(model.policy, [slot], rank if isinstance(rank, int) and rank >= 1 else None)
        lora.read(model.policy, slot, folder, model.fingerprint)
    except MoalignError as error:
        if slot in model.policy.peft_config:
            model.policy.delete_adapter(slot)
        raise ConfigError(
            f"loss.{option}: {error}; give an adapter that moalign wrote for this base, with this run's "
            "model.lora.targets and layers"
        ) from None
    hashes = [storage.sha256_of(folder / file) for file in FILES]  # rank and alpha are in one, weights in the other
    return FrozenPolicy(slot, hashlib.sha256("/".join(hashes).encode()).hexdigest())

"""Frozen adapters that a loss reads beside its reference: looked for before a model is loaded, then loaded once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from glob import escape, glob
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
CANDIDATE = "{candidate}"  # in a folder's name: the id of whoever is trained, so that each has a guide of its own


def folders_of(objective: Objective, candidate: str = CANDIDATE) -> dict[str, Path]:
    """The folders that the loss names, by option; with an id, those of that candidate.

    Raises PluginError where it names something else.
    """
    found: Any = door.call(objective, "guides")
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        who = door.origin(objective).who
        raise PluginError(f"{who}, in guides: it must return folders by name, not {found!r}")
    return {name: Path(path.replace(CANDIDATE, candidate)).expanduser() for name, path in sorted(found.items())}


def is_each_ones(folder: Path) -> bool:
    """Whether every candidate has a folder of its own in this place."""
    return CANDIDATE in str(folder)


def in_measure(objective: Objective) -> bool:
    """Whether the log-probabilities under them are known once for a round, where the loss measures it."""
    return "token_advantages" in objective.wants and type(objective).measure is not Objective.measure


def in_loss(objective: Objective) -> bool:
    """Whether each step needs them: their log-probabilities, or the whole of what they say."""
    return not in_measure(objective) or "distributions" in objective.wants


def check(plan: Plan) -> None:
    """Raise ConfigError where a folder that serves all candidates holds no adapter, or there is no place for one."""
    folders, name = folders_of(plan.objective), plan.config.loss.name
    for option, folder in folders.items():
        if not is_each_ones(folder):
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


def check_candidate(objective: Objective, candidate: str) -> None:
    """Raise ConfigError where a candidate that is to be trained has no adapter in the folder that is its own."""
    own = folders_of(objective, candidate)
    for option, folder in folders_of(objective).items():
        if is_each_ones(folder):
            check_folder(option, own[option])


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
    return FrozenPolicy(slot, _identity([folder]))


def identities(objective: Objective) -> dict[str, str]:
    """What the adapters are known again by, by option; of all candidates', where each has its own."""
    return {option: _identity(_alike(folder)) for option, folder in folders_of(objective).items()}


def _alike(folder: Path) -> list[Path]:
    """The folder; or, where each candidate has its own, all that hold an adapter."""
    if not is_each_ones(folder):
        return [folder]
    found = map(Path, sorted(glob("*".join(map(escape, str(folder).split(CANDIDATE))))))
    return [each for each in found if all((each / file).is_file() for file in FILES)]


def _identity(folders: Sequence[Path]) -> str:
    """Rank and alpha are in one file, weights in the other."""
    hashes = [storage.sha256_of(folder / file) for folder in folders for file in FILES]
    return hashlib.sha256("/".join(hashes).encode()).hexdigest()

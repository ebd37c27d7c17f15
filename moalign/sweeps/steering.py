"""From a preference to an adapter and a model, out of a run directory alone: neither the data nor any plugin is needed.

Nothing in a run directory is trusted: folders are named by ids that are checked, every file by its checksum, adapters
by the base that they were trained on, and of their configuration only rank, scaling and place are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moalign import lora, preference, storage
from moalign.config import Config
from moalign.engine import model as models
from moalign.errors import CorruptFileError, ModelError, RunError
from moalign.lora import mixing, ordinary
from moalign.lora.mixing import Adapter
from moalign.sweeps import front, journal, neighbours, outcomes
from moalign.types import Outcome, Preference


@dataclass(frozen=True)
class Archive:
    """What of a run is needed to steer by it."""

    directory: Path
    record: Mapping[str, Any]
    config: Config
    history: tuple[Outcome, ...]

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.config.objective_names

    @property
    def presets(self) -> dict[str, Preference]:
        """The preferences that the configuration names."""
        found: dict[str, Preference] = {}
        for name, value in self.config.preferences.items():
            found[name] = preference.parse(value, self.objectives, found, where=f"preferences.{name}")
        return found


@dataclass(frozen=True)
class Mix:
    """Candidates and the share of each, which sum to 1; ``wanted``: the preference that they stand for, if one was
    asked for."""

    shares: Mapping[str, float]
    wanted: Preference | None = None

    @property
    def text(self) -> str:
        """For people: whose adapters, how much of each."""
        if len(self.shares) == 1:
            return f"the adapter of {next(iter(self.shares))}"
        return " + ".join(f"{share:.4g} of {name}" for name, share in self.shares.items())


def open_archive(directory: Path) -> Archive:
    """Raises RunError where it is no run directory, CorruptFileError where its journal is damaged."""
    record = front.read_record(directory)
    config = Config.model_validate(record["config"])
    history = outcomes.history(journal.read(directory / journal.FILE), config.objective_names)
    return Archive(directory, record, config, tuple(history))


def of_candidate(archive: Archive, candidate: str) -> Mix:
    """One point of the run by its id. Raises RunError with the ids that there are, or why that one has no adapter."""
    done = [outcome.id for outcome in archive.history if outcome.status == "done"]
    if candidate in done:
        return Mix({candidate: 1.0})
    for outcome in archive.history:
        if outcome.id == candidate:
            raise RunError(f"{archive.directory}: the candidate '{candidate}' failed: {outcome.error}")
    raise RunError(f"{archive.directory}: no candidate '{candidate}'; {_there(archive, done)}")


def for_preference(archive: Archive, prefer: object) -> Mix:
    """What a preference is made of: the candidate trained for it, or the neighbours between which it lies.

    ``prefer``: anything that ``preference.parse`` takes, also a name from the configuration. Raises PreferenceError.
    """
    wanted = preference.parse(prefer, archive.objectives, archive.presets, where="prefer")
    if not any(outcome.status == "done" for outcome in archive.history):
        raise RunError(f"{archive.directory}: {_there(archive, [])}")
    return Mix(neighbours.asked(wanted, archive.objectives, archive.history), wanted)


def _there(archive: Archive, done: list[str]) -> str:
    if done:
        return f"there are {', '.join(done)}"
    failed = [outcome for outcome in archive.history if outcome.status == "failed"]
    if failed:
        return f"every candidate failed; the first, {failed[0].id}: {failed[0].error}"
    return "none is finished yet; `moalign resume` goes on with the run"


def adapter(archive: Archive, mix: Mix, r: int | None = None) -> tuple[Adapter, mixing.Truncation]:
    """The adapter of a mix, and what a rank ``r`` below its own lost. Without ``r`` nothing is lost.

    Raises CorruptFileError or RunError naming the file that is missing, altered, of another base or of another kind.
    """
    parts = [_verified(archive, candidate) for candidate in mix.shares]
    return mixing.soup(parts, list(mix.shares.values()), r=r)


def _verified(archive: Archive, candidate: str) -> Adapter:
    if not storage.safe_name(candidate):
        raise CorruptFileError(f"{archive.directory / journal.FILE}: {candidate!r} is not the name of a folder")
    folder = archive.directory / "candidates" / candidate
    storage.verify(folder)
    outcome = next(outcome for outcome in archive.history if outcome.id == candidate)
    if outcome.checksum != storage.sha256_of(folder / lora.WEIGHTS_FILE):
        raise CorruptFileError(f"{folder / lora.WEIGHTS_FILE}: not the adapter that the journal tells of; restore it")
    found = mixing.read(folder)
    if found.base != archive.record["base"]:
        raise RunError(f"{folder}: this adapter was trained on another base model than the run")
    return replace(found, name=candidate)


def base_of(archive: Archive, base: str | None) -> str:
    """Where the base model is: as said, or as the run has it."""
    return base or archive.config.model_directory


def load(
    archive: Archive, mix: Mix, *, base: str | None = None, r: int | None = None, device: str = "cpu"
) -> tuple[Any, Any]:
    """(peft model, tokenizer) of a mix, both as anybody else would have loaded them, the model in evaluation mode.

    ``base``: where the base model is now, if not where the run says. The base is in the precision that the run trained
    on, adapters in float32. Raises ModelError, and RunError where the base is not the one of the run.
    """
    made, _ = adapter(archive, mix, r)
    loaded = verified_base(archive, base, torch.device(device))
    return ordinary.attach(loaded, made), models.load_tokenizer(base_of(archive, base))


def verified_base(archive: Archive, base: str | None, device: torch.device) -> Any:
    """The base model in the precision that the run trained on, once its weights are known to be those of the run."""
    path = base_of(archive, base)
    dtype: str = archive.config.model.dtype
    if dtype == "auto":  # which depends on where the run trained, not on where its model is loaded
        dtype = "float32" if str(archive.record.get("device", "cpu")).startswith("cpu") else "stored"
    models.quiet()
    try:
        loaded = models.load_base(path, dtype, device)
    except ModelError as error:
        if base is not None:
            raise
        raise ModelError(
            f"{error}; if the base model is elsewhere now, say where (--base, from Python base=)"
        ) from None
    if models.base_fingerprint(loaded) != archive.record["base"]:
        raise RunError(f"{path}: not the base model that {archive.directory} was trained on")
    return loaded.requires_grad_(False)

"""From a preference to an adapter and a model, out of a run directory alone: neither the data nor any plugin is needed.

Nothing in a run directory is trusted: folders are named by ids that are checked, every file by its checksum, adapters
by the base that they were trained on, and of their configuration only rank, scaling and place are taken.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from moalign import lora, storage
from moalign.engine import model as models
from moalign.errors import CorruptFileError, ModelError, RunError, UserError
from moalign.lora import mixing, ordinary
from moalign.lora.mixing import Adapter
from moalign.sweeps import journal
from moalign.sweeps.archive import Archive, Mix

log = logging.getLogger(__name__)


def adapter(archive: Archive, mix: Mix, r: int | None = None) -> tuple[Adapter, mixing.Truncation]:
    """The adapter of a mix, and what a rank ``r`` below its own lost. Without ``r`` nothing is lost.

    Raises CorruptFileError or RunError naming the file that is missing, altered, of another base or of another kind.
    """
    if len(mix.shares) == 1 and r is None:
        return _verified(archive, next(iter(mix.shares)), alone=True), mixing.Truncation({}, 0.0)
    parts = [_verified(archive, candidate) for candidate in mix.shares]
    return mixing.soup(parts, list(mix.shares.values()), r=r)


def _verified(archive: Archive, candidate: str, alone: bool = False) -> Adapter:
    if not storage.safe_name(candidate):
        raise CorruptFileError(f"{archive.directory / journal.FILE}: {candidate!r} is not the name of a folder")
    folder = archive.directory / "candidates" / candidate
    storage.verify(folder)
    outcome = next(outcome for outcome in archive.history if outcome.id == candidate)
    if outcome.checksum != storage.sha256_of(folder / lora.WEIGHTS_FILE):
        raise CorruptFileError(f"{folder / lora.WEIGHTS_FILE}: not the adapter that the journal tells of; restore it")
    found = mixing.read(folder, alone=alone)
    if found.base != archive.record["base"]:
        raise RunError(f"{folder}: this adapter was trained on another base model than the run")
    return replace(found, name=candidate)


def load(
    archive: Archive, mix: Mix, *, base: str | None = None, r: int | None = None, device: str = "cpu"
) -> tuple[Any, Any]:
    """(peft model, tokenizer) of a mix, both as anybody else would have loaded them, the model in evaluation mode.

    ``base``: where the base model is now, if not where the run says. The base is in the precision that the run trained
    on, adapters in float32. Raises ModelError, and RunError where the base is not the one of the run.
    """
    made, _ = adapter(archive, mix, r)
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"device: '{device}' is none; such as cpu, cuda or cuda:1") from None
    loaded = verified_base(archive, base, place)
    tokenizer = models.load_tokenizer(base or archive.base)
    if models.tokenizer_fingerprint(tokenizer) != archive.record["tokenizer"]:
        log.warning(
            "%s: not the tokenizer of the run, in its tokens or its chat template (or read by another version of "
            "transformers); replies may be worse for it",
            base or archive.base,
        )
    return ordinary.attach(loaded, made), tokenizer


def ending_of_prompts(archive: Archive, mix: Mix) -> str:
    """The white space in which all prompts end that the run was evaluated on, as recorded beside the mix's adapters;
    "" where they do not agree. A line that somebody types has lost it, and the policy has seen no prompt without."""
    endings: set[str] = set()
    for candidate in mix.shares:
        file = archive.directory / "candidates" / candidate / "samples.jsonl"
        for line in storage.read_bytes(file).splitlines():
            try:
                prompt = storage.parse_json(line)["prompt"]
                endings.add(prompt[len(prompt.rstrip()) :])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CorruptFileError(f"{file}: a line is not the sample that was written here") from error
    return endings.pop() if len(endings) == 1 else ""


def verified_base(archive: Archive, base: str | None, device: torch.device) -> Any:
    """The base model in the precision that the run trained on, once its weights are known to be those of the run."""
    path = base or archive.base
    dtype: str = archive.config.model.dtype
    if dtype == "auto":  # which depends on where the run trained, not on where its model is loaded
        dtype = "float32" if archive.record["device"].startswith("cpu") else "stored"
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

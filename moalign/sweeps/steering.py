"""From a preference to an adapter and a model, out of a run directory alone: the data is not needed, and no plugin but
the conditioner of a run that has one.

Nothing in a run directory is trusted: folders are named by ids that are checked, every file by its checksum, adapters
by the base that they were trained on, and of their configuration only rank, scaling and place are taken.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moalign import lora, preference, registry, storage
from moalign.api import Conditioner
from moalign.engine import model as models
from moalign.engine.conditioning import text_of
from moalign.errors import CorruptFileError, ModelError, PreferenceError, RunError, UserError
from moalign.lora import mixing, ordinary
from moalign.lora.mixing import Adapter
from moalign.sweeps import conditioned, conditions, journal, posteriors, samples
from moalign.sweeps.archive import Archive, Draw, Mix
from moalign.types import Preference

log = logging.getLogger(__name__)


def adapter(archive: Archive, mix: Mix, r: int | None = None) -> tuple[Adapter, mixing.Truncation]:
    """The adapter of a mix, and what a rank ``r`` below its own lost. Without ``r`` nothing is lost.

    Raises CorruptFileError or RunError naming the file that is missing, altered, of another base or of another kind.
    """
    if mix.conditioned or mix.draw is not None:
        made = _asked(archive, mix) if mix.draw is None else _drawn(archive, mix, mix.draw)
        return (made, mixing.Truncation({}, 0.0)) if r is None else mixing.soup([made], [1.0], r=r)
    if len(mix.shares) == 1 and r is None:
        return verified(archive, next(iter(mix.shares)), alone=True), mixing.Truncation({}, 0.0)
    parts = [verified(archive, candidate) for candidate in mix.shares]
    return mixing.soup(parts, list(mix.shares.values()), r=r)


def _asked(archive: Archive, mix: Mix) -> Adapter:
    """The adapter that the run's one model has for the preference."""
    (model,) = mix.shares
    wanted = _wanted(archive, mix)
    verified(archive, model, alone=True)
    folder, names = archive.directory / "candidates" / model, archive.config.objective_names
    return replace(conditioned.adapter(folder, _conditioner(archive), wanted, names), name=model)


def _drawn(archive: Archive, mix: Mix, draw: Draw) -> Adapter:
    """An adapter from the posteriors of the mix's candidates."""
    parts = [verified(archive, candidate, alone=True) for candidate in mix.shares]
    folders = [archive.directory / "candidates" / candidate for candidate in mix.shares]
    return posteriors.drawn(parts, folders, list(mix.shares.values()), draw.mass, draw.seed)


def _conditioner(archive: Archive) -> Conditioner:
    """Of a run that has one. Raises UnknownPluginError where it is not installed."""
    found = conditions.conditioner_of(archive.config, registry.discover())
    assert found is not None
    return found


def text(archive: Archive, mix: Mix) -> str:
    """What stands in front of every prompt to this point; "" where its adapter is all that tells it the preference."""
    if archive.config.condition is None:
        return ""
    conditioner = _conditioner(archive)
    return text_of(conditioner, _wanted(archive, mix)) if conditioner.by == "text" else ""


def vectors(archive: Archive, mix: Mix) -> Tensor | None:
    """[k,D], the virtual tokens that stand in front of every prompt to this point; None where it has none.

    Raises CorruptFileError or RunError naming the file that is missing, altered or of another base.
    """
    if archive.config.condition is None:
        return None
    conditioner = _conditioner(archive)
    if conditioner.by != "vectors":
        return None
    verified(archive, conditions.MODEL, alone=True)
    folder, names = archive.directory / "candidates" / conditions.MODEL, archive.config.objective_names
    return conditioned.vectors(folder, conditioner, _wanted(archive, mix), names, archive.record["base"])


def told_in_prompt(archive: Archive) -> str:
    """In words, how prompts tell the run's one model a preference; "" where its adapter is all that does."""
    if archive.config.condition is None:
        return ""
    return {"text": "in text", "vectors": "by virtual tokens"}.get(_conditioner(archive).by, "")


def _wanted(archive: Archive, mix: Mix) -> Preference:
    """What the run's one model is asked for at this point. Raises PreferenceError for what it cannot be told."""
    if mix.wanted is not None:
        if mix.wanted.kind == "direction" and _conditioner(archive).by != "text":
            raise PreferenceError(
                f"{preference.format(mix.wanted)}: the model of this run is told weights that sum to 1; write weights"
            )
        return mix.wanted
    (name,) = mix.shares
    return next(outcome.preference for outcome in archive.history if outcome.id == name)


def verified(archive: Archive, candidate: str, alone: bool = False) -> Adapter:
    """A candidate's adapter as the journal tells of it. ``alone``: it is not mixed, so it may adapt embeddings as well.

    Raises CorruptFileError or RunError naming what is missing, altered, of another base or of another kind.
    """
    if not storage.safe_name(candidate):
        raise CorruptFileError(f"{archive.directory / journal.FILE}: {candidate!r} is not the name of a folder")
    folder = archive.directory / "candidates" / candidate
    storage.verify(folder)
    told = next((outcome.checksum for outcome in archive.history if outcome.id == candidate), None)
    if told != storage.sha256_of(folder / lora.WEIGHTS_FILE):
        raise CorruptFileError(f"{folder / lora.WEIGHTS_FILE}: not the adapter that the journal tells of; restore it")
    found = mixing.read(folder, alone=alone)
    if found.base != archive.record["base"]:
        raise RunError(f"{folder}: this adapter was trained on another base model than the run")
    return replace(found, name=candidate)


def load(
    archive: Archive, mix: Mix, *, base: str | None = None, r: int | None = None, device: str = "cpu"
) -> tuple[Any, Any]:
    """(peft model, tokenizer) of a mix, both as anybody else would have loaded them, the model in evaluation mode.

    What prompts tell the model beside its adapter is the caller's affair: ``text``, ``vectors``.
    ``base``: where the base model is now, if not where the run says. The base is in the precision that the run trained
    on, adapters in float32. Raises ModelError, and RunError where the base is not the one of the run.
    """
    where = place(device)
    made, _ = adapter(archive, mix, r)
    loaded = verified_base(archive, base, where)
    tokenizer = models.load_tokenizer(base or archive.base)
    compare_tokenizers(archive, models.tokenizer_fingerprint(tokenizer), base)
    return ordinary.attach(loaded, made), tokenizer


def place(device: str) -> torch.device:
    """The device of that name. Raises UserError where there is none of the kind, or not on this machine."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"device: '{device}' is none; such as cpu, cuda or cuda:1") from None
    try:
        torch.zeros((), device=found).item()
    except (AssertionError, RuntimeError, ImportError) as error:
        raise UserError(f"device: '{device}' cannot be used on this machine: {str(error).splitlines()[0]}") from None
    return found


def precision(archive: Archive) -> str:
    """Of the base that the run trained on, as ``models.load_base`` takes it; "auto" depends on where a run trained, not
    on where its model is loaded."""
    dtype: str = archive.config.model.dtype
    if dtype != "auto":
        return dtype
    return "float32" if archive.record["device"].startswith("cpu") else "stored"


def compare_tokenizers(archive: Archive, fingerprint: str, base: str | None) -> None:
    """Warn of a tokenizer that is not the run's."""
    if fingerprint != archive.record["tokenizer"]:
        log.warning(
            "%s: not the tokenizer of the run, in its tokens or its chat template (or read by another version of "
            "transformers); replies may be worse for it",
            base or archive.base,
        )


def ending_of_prompts(archive: Archive, mix: Mix) -> str:
    """The white space in which all prompts end that the run was evaluated on, as recorded beside the mix's adapters;
    "" where they do not agree. A line that somebody types has lost it, and the policy has seen no prompt without."""
    folders = [archive.directory / "candidates" / candidate for candidate in mix.shares]
    prompts = {line.prompt for folder in folders for line in samples.read(folder)}
    endings = {prompt[len(prompt.rstrip()) :] for prompt in prompts}
    return endings.pop() if len(endings) == 1 else ""


def verified_base(archive: Archive, base: str | None, device: torch.device) -> Any:
    """The base model in the precision that the run trained on, once its weights are known to be those of the run."""
    models.quiet()
    with elsewhere(base):
        loaded = models.load_base(base or archive.base, precision(archive), device)
    compare_bases(archive, models.base_fingerprint(loaded), base)
    return loaded.requires_grad_(False)


def compare_bases(archive: Archive, fingerprint: str, base: str | None) -> None:
    """Raise RunError for a base that is not the run's."""
    if fingerprint != archive.record["base"]:
        raise RunError(f"{base or archive.base}: not the base model that {archive.directory} was trained on")


@contextmanager
def elsewhere(base: str | None) -> Iterator[None]:
    """Where the run's own base cannot be loaded: how to say where it is now."""
    try:
        yield
    except ModelError as error:
        if base is not None:
            raise
        raise ModelError(
            f"{error}; if the base model is elsewhere now, say where (--base, from Python base=)"
        ) from None

"""The base of a run with several of its candidates' adapters in it, all of which are checked: nothing in a run
directory is trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moalign import door, lora
from moalign.engine import model as models
from moalign.engine.model import LanguageModel
from moalign.sweeps import steering
from moalign.sweeps.archive import Archive


def load(
    archive: Archive, candidates: Sequence[str], base: str | None, device: torch.device
) -> tuple[LanguageModel, dict[str, str]]:
    """The base with an adapter for each of these, side by side, and the names of their slots, by id.

    ``base``: where the base model is now, if not where the run says. Raises RunError for an unknown id or another base,
    CorruptFileError, ModelError.
    """
    for name in candidates:
        archive.of_candidate(name)
        steering.verified(archive, name, alone=True)
    slots = {name: f"speaker-{number}" for number, name in enumerate(dict.fromkeys(candidates))}
    with door.kept_generators():  # adapters are filled with random numbers before they are read
        model = _filled(archive, slots, base, device)
    model.policy.requires_grad_(False)
    return model, slots


def _filled(archive: Archive, slots: Mapping[str, str], base: str | None, device: torch.device) -> LanguageModel:
    settings = archive.config.model.model_copy(update={"dtype": steering.precision(archive)})
    with steering.elsewhere(base):
        model = models.load(base or archive.base, settings, device)
    steering.compare_bases(archive, model.fingerprint, base)
    steering.compare_tokenizers(archive, model.tokenizer_fingerprint, base)
    if slots:
        lora.add_slots(model.policy, list(slots.values()))
        for name, slot in slots.items():
            lora.read(model.policy, slot, archive.directory / "candidates" / name, model.fingerprint)
        lora.stack(model.policy, list(slots.values()))
    return model

"""The adapters that a run's reference begins with, added up in delta space and loaded once for all candidates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moalign import lora
from moalign.engine.model import LanguageModel
from moalign.engine.reference_policy import BASE, FrozenPolicy
from moalign.errors import RunError, UserError
from moalign.lora import frozen, mixing, unsigned
from moalign.sweeps import comparing
from moalign.sweeps.plan import Plan

SLOT = "reference"


def load(plan: Plan, model: LanguageModel, warn: Callable[[str], None]) -> FrozenPolicy:
    """What every candidate's reference is before it moves: the base, or it with the sum of the adapters that are named.

    Raises RunError or CorruptFileError naming the folder of one that is damaged, of another base, or of layers that
    the run does not adapt.
    """
    if plan.reference is None or plan.config.reference is None:
        return BASE
    shares = comparing.adapters_of(plan.reference)
    if not shares:
        return BASE
    key = f"reference: '{plan.config.reference.name}'"
    adapters = []
    for path in shares:
        folder = Path(path).expanduser()
        try:
            adapter = mixing.read(folder, taken_for=model.fingerprint)
        except UserError as error:
            raise type(error)(f"{key}: {error}") from None
        if adapter.base != model.fingerprint:
            raise RunError(f"{key}: {folder}: this adapter was trained on another base model")
        if not unsigned.names_base(folder / lora.WEIGHTS_FILE):
            warn(f"{key}: {folder} does not say on which weights it was trained; it is taken to be this run's base")
        adapters.append(adapter)
    made, _ = mixing.soup(adapters, list(shares.values()))
    lora.add_slots(model.policy, [SLOT])
    frozen.place(model.policy, SLOT, made.tensors, made.scaling, f"{key}: {made.name}")
    if frozen.adds_nothing(model.policy, SLOT):
        return BASE
    return FrozenPolicy(SLOT, frozen.digest(made.tensors, made.scaling))

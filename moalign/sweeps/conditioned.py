"""One model for many preferences in a run directory: kept with what conditions it, and asked for one of them.

Every folder holds a plain adapter: that of the candidate's own preference, where the conditioner gates it
(``lora.gated``), else the only one. Beside the model's stands what the conditioner owns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from moalign import storage
from moalign.api import Conditioner
from moalign.batch import AdapterShape
from moalign.engine.conditioning import gates_of, vectors_of
from moalign.engine.row_conditions import RowConditions, place_of_vectors
from moalign.engine.trainee import Trainee
from moalign.errors import CorruptFileError, RunError
from moalign.lora import gated, mixing
from moalign.lora.mixing import Adapter
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate, Preference

FILE = gated.FILE


def told(candidate: Candidate, workshop: Workshop) -> Preference | None:
    """The preference that its prompts tell the candidate, if they do."""
    conditioner = workshop.plan.conditioner
    return candidate.preference if conditioner is not None and conditioner.by != "gates" else None


def keep(trainee: Trainee, wanted: Preference, workshop: Workshop, folder: Path) -> RowConditions | None:
    """Write what conditions the model for any preference. What stays in the slot is the adapter for this one, and what
    its prompts need beside it is returned."""
    conditioning = trainee.job.conditioning
    if conditioning is None or not conditioning.by_row:
        return None
    policy, fingerprint = workshop.model.policy, workshop.model.fingerprint
    if conditioning.conditioner.by == "vectors":
        _write(trainee.conditioned, conditioning.shape, folder, fingerprint)
        return of_rows(folder, conditioning.conditioner, wanted, workshop)
    gated.write(gated.family(policy, trainee.slot, trainee.conditioned), folder, fingerprint)
    vector = torch.tensor([wanted.vector(conditioning.objectives)], device=workshop.model.device)
    with torch.no_grad():
        conditions = conditioning.of_rows(vector, trainee.conditioned)
    assert conditions is not None and conditions.gates is not None
    gated.fold(policy, trainee.slot, conditions.gates[0])
    return None


def adapter(folder: Path, conditioner: Conditioner, wanted: Preference, objectives: tuple[str, ...]) -> Adapter:
    """The plain adapter that the model in this folder has for a preference; where prompts tell it, its only one.

    Raises RunError or CorruptFileError naming the file that is damaged, or of another base.
    """
    found = mixing.read(folder, alone=True)
    if conditioner.by != "gates":
        return found
    family = gated.read(folder, found.base)
    shape = AdapterShape(len(family.layers), family.rank, len(objectives))
    with torch.no_grad():
        gates = gates_of(conditioner, torch.tensor([wanted.vector(objectives)]), dict(family.own), shape)
    return replace(found, tensors=family.at(gates[0]))


def of_rows(folder: Path, conditioner: Conditioner, wanted: Preference, workshop: Workshop) -> RowConditions | None:
    """What a row needs beside its prompt and the adapter, under the model in this folder; None: nothing."""
    if conditioner.by != "vectors":
        return None
    found = vectors(folder, conditioner, wanted, workshop.plan.objectives, workshop.model.fingerprint)
    return RowConditions(
        vectors=found[None].to(workshop.model.device), place=place_of_vectors(workshop.model.tokeniser)
    )


@torch.no_grad()
def vectors(
    folder: Path, conditioner: Conditioner, wanted: Preference, objectives: tuple[str, ...], base_fingerprint: str
) -> Tensor:
    """[k,D] on the CPU: the virtual tokens of a preference. Raises as ``adapter``."""
    own, shape = _read(folder, base_fingerprint)
    return vectors_of(conditioner, torch.tensor([wanted.vector(objectives)]), own, shape)[0]


def _write(own: Mapping[str, Tensor], shape: AdapterShape, folder: Path, base_fingerprint: str) -> None:
    told = asdict(replace(shape, embeddings=None))
    storage.write_tensors(folder / FILE, own, {"base": base_fingerprint, "shape": json.dumps(told)})


def _read(folder: Path, base_fingerprint: str) -> tuple[dict[str, Tensor], AdapterShape]:
    file = folder / FILE
    metadata = storage.read_metadata(file)
    if metadata.get("base") != base_fingerprint:
        raise RunError(f"{file}: these vectors were trained for another base model")
    try:
        shape = AdapterShape(**json.loads(metadata["shape"]))
    except (KeyError, ValueError, TypeError):
        raise CorruptFileError(f"{file}: it does not say which adapter and base it was made for") from None
    return storage.read_tensors(file), shape

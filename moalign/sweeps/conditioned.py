"""One model for many preferences in a run directory: kept with what conditions it, and asked for one of them.

Every folder holds a plain adapter, that of the candidate's own preference. Beside the model's stands what makes the
adapter of any other, where the conditioner gates it (``lora.gated``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moalign.api import Conditioner
from moalign.engine.conditioning import gates_of
from moalign.engine.trainee import Trainee
from moalign.lora import gated, mixing
from moalign.lora.mixing import Adapter
from moalign.sweeps.workshop import Workshop
from moalign.types import AdapterShape, Candidate, Preference


def told(candidate: Candidate, workshop: Workshop) -> Preference | None:
    """The preference that its prompts tell the candidate, if they do."""
    conditioner = workshop.plan.conditioner
    return candidate.preference if conditioner is not None and conditioner.by == "text" else None


def keep(trainee: Trainee, wanted: Preference, workshop: Workshop, folder: Path) -> None:
    """Write what makes an adapter for any preference; what stays in the slot is the one for this preference."""
    conditioning = trainee.job.conditioning
    if conditioning is None or not conditioning.gated:
        return
    policy, fingerprint = workshop.model.policy, workshop.model.fingerprint
    gated.write(gated.family(policy, trainee.slot, trainee.conditioned), folder, fingerprint)
    vector = torch.tensor([wanted.vector(conditioning.objectives)], device=workshop.model.device)
    with torch.no_grad():
        gated.fold(policy, trainee.slot, conditioning.gates(vector, trainee.conditioned)[0])


def adapter(folder: Path, conditioner: Conditioner, wanted: Preference, objectives: tuple[str, ...]) -> Adapter:
    """The plain adapter that the model in this folder has for a preference; where it is told in text, its only one.

    Raises RunError or CorruptFileError naming the file that is damaged, or of another base.
    """
    found = mixing.read(folder, alone=True)
    if conditioner.by == "text":
        return found
    family = gated.read(folder, found.base)
    vector = torch.tensor([wanted.vector(objectives)])
    gates = _gates(conditioner, vector, family, len(objectives))
    return replace(found, tensors=family.at(gates))


@torch.no_grad()
def _gates(conditioner: Conditioner, vector: Tensor, family: gated.Family, objectives: int) -> Tensor:
    shape = AdapterShape(len(family.layers), family.rank, objectives)
    return gates_of(conditioner, vector, dict(family.own), shape)[0]

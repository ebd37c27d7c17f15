"""Points of the front that are not trained: the one model of the run, asked for a preference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moalign import lora
from moalign.engine.model import TRAINED
from moalign.errors import TrainingError
from moalign.lora import mixing
from moalign.sweeps import conditioned
from moalign.sweeps.candidate import Content, settle
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate, Outcome


def ask_candidate(candidate: Candidate, workshop: Workshop, history: Sequence[Outcome]) -> Outcome:
    """Write the adapter that the model has for the candidate's preference, and evaluate it."""

    def fill(folder: Path) -> Content:
        (model,) = candidate.parents
        trained = next((outcome for outcome in history if outcome.id == model), None)
        if trained is None or trained.status != "done":
            reason = f": {trained.error}" if trained is not None else " yet"
            raise TrainingError(f"there is no model to ask{reason}")
        conditioner, objectives = workshop.plan.conditioner, workshop.plan.objectives
        assert conditioner is not None
        parent = workshop.directory / "candidates" / model
        mixing.write(conditioned.adapter(parent, conditioner, candidate.preference, objectives), folder)
        lora.read(workshop.model.policy, TRAINED, folder, workshop.model.fingerprint)
        conditions = conditioned.of_rows(parent, conditioner, candidate.preference, workshop)
        return Content(parents={model: 1.0}, conditions=conditions)

    return settle(candidate, TRAINED, workshop, fill)

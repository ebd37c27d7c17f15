"""Points of the front that are not trained: a mix of the adapters trained for the nearest preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moalign import lora
from moalign.engine.model import TRAINED
from moalign.errors import PreferenceError, TrainingError
from moalign.lora import mixing
from moalign.sweeps import neighbours
from moalign.sweeps.candidate import Content, settle
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate, Outcome


def mix_candidate(candidate: Candidate, workshop: Workshop, history: Sequence[Outcome]) -> Outcome:
    """Mix in delta space, compress to the run's rank, evaluate. A function of the parents' files and the candidate.

    The details say what the compression lost, relative to the whole update.
    """

    def fill(folder: Path) -> Content:
        # by name: a proposal that is read from the journal names them in another order, and sums are rounded in order
        given = dict(sorted(candidate.shares.items()))
        shares = given or _shares(candidate, workshop.plan.objectives, history)
        parents = [mixing.read(workshop.directory / "candidates" / parent) for parent in shares]
        mix, lost = mixing.soup(parents, list(shares.values()), r=workshop.plan.config.model.lora.r)
        mixing.write(mix, folder)
        lora.read(workshop.model.policy, TRAINED, folder, workshop.model.fingerprint)
        parts = {parent: float(np.mean(share)) for parent, share in shares.items()}
        return Content(parents=parts, details={"lost to rank": lost.total})

    return settle(candidate, TRAINED, workshop, fill)


def _shares(candidate: Candidate, objectives: tuple[str, ...], history: Sequence[Outcome]) -> dict[str, float]:
    """Which trained candidates are mixed, and how much of each."""
    try:
        return neighbours.shares(candidate.preference, objectives, history)
    except PreferenceError as error:
        raise TrainingError(f"nothing to mix {candidate.id} from: {error}") from None

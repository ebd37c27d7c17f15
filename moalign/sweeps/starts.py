"""Where a candidate's training starts: fresh weights, another's adapter, or a mix of several."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moalign.engine import owned
from moalign.errors import TrainingError, UserError
from moalign.lora import mixing
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate

Shares = Mapping[str, mixing.Coefficient]


def start(candidate: Candidate, workshop: Workshop, scratch: Path) -> Path | None:
    """The folder of the adapter from which the candidate starts; None: fresh weights.

    A mix is written under ``scratch``, compressed to the run's rank. What the loss owns cannot be mixed: it is taken
    from the parent with the largest share.
    """
    candidates = workshop.directory / "candidates"
    if candidate.parents:
        return candidates / candidate.parents[0]
    if not candidate.shares:
        return None
    made, _ = mix(candidate.shares, workshop)
    folder = scratch / candidate.id
    folder.mkdir()
    mixing.write(made, folder)
    shares = parents_of(candidate)
    own = candidates / max(sorted(shares), key=shares.__getitem__) / owned.FILE  # by name: as in the journal
    if own.exists():
        shutil.copy(own, folder / owned.FILE)
    return folder


def mix(shares: Shares, workshop: Workshop) -> tuple[mixing.Adapter, mixing.Truncation]:
    """What these candidates' adapters are together, compressed to the run's rank, and what that lost.

    Raises TrainingError, or what else concerns this mix alone, where they do not go together.
    """
    # by name: a proposal that is read from the journal names them in another order, and sums are rounded in order
    ordered = dict(sorted(shares.items()))
    try:
        adapters = [mixing.read(workshop.directory / "candidates" / parent) for parent in ordered]
        return mixing.soup(adapters, list(ordered.values()), r=workshop.plan.config.model.lora.r)
    except UserError as error:  # a search chose them, no user: another candidate would not meet it
        raise TrainingError(str(error)) from error


def parents_of(candidate: Candidate) -> dict[str, float]:
    """Whose adapters it starts from, with the share of each."""
    return whole(candidate.shares) or dict.fromkeys(candidate.parents, 1.0)


def whole(shares: Shares) -> dict[str, float]:
    """One share for each: the mean of the blocks', where there are several."""
    return {parent: float(np.mean(share)) for parent, share in shares.items()}

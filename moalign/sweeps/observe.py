"""What a sweep tells whoever watches it. An observer changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moalign.types import Candidate, Outcome

if TYPE_CHECKING:
    from moalign.sweeps.material import Material
    from moalign.sweeps.plan import Plan

log = logging.getLogger(__name__)


class Observer:
    """Watches in silence; subclasses override what they are interested in. Plugins watch through ``watchers``."""

    def on_phase(self, what: str) -> None:
        """Something that takes a moment begins."""

    def on_warning(self, what: str) -> None:
        """Something went wrong that does not stop the run; nobody else says it."""
        log.warning("%s", what)

    def on_run_start(self, plan: Plan, material: Material, finished: int) -> None:
        """Model and data are ready; ``finished`` candidates are already in the journal."""

    def on_training_start(self, counts: Mapping[str, int], warnings: Sequence[str], steps: int, members: int) -> None:
        """The same for a reward model: each of its members takes so many steps, told under its name."""

    def on_skipped(self, outcomes: Sequence[Outcome]) -> None:
        """The budget does not pay these; they are not trained."""

    def on_proposed(self, candidates: Sequence[Candidate]) -> None:
        """What the search wants next; of a proposal that was cut short, what is missing."""

    def on_candidate_start(self, candidate: Candidate) -> None: ...

    def on_step(self, candidate: Candidate, step: int, metrics: dict[str, Any]) -> None: ...

    def on_candidate_end(self, outcome: Outcome) -> None: ...

    def on_run_end(self, front: dict[str, Any]) -> None: ...

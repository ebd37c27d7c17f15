"""What a sweep tells whoever watches it. An observer changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moalign.types import Candidate, Outcome

if TYPE_CHECKING:
    from moalign.sweeps.material import Material
    from moalign.sweeps.plan import Plan


class Observer:
    """Watches in silence; subclasses override what they are interested in."""

    def on_phase(self, what: str) -> None:
        """Something that takes a moment begins."""

    def on_run_start(self, plan: Plan, material: Material, finished: int) -> None:
        """Model and data are ready; ``finished`` candidates are already in the journal."""

    def on_candidate_start(self, candidate: Candidate) -> None: ...

    def on_step(self, candidate: Candidate, step: int, metrics: dict[str, Any]) -> None: ...

    def on_candidate_end(self, outcome: Outcome) -> None: ...

    def on_run_end(self, front: dict[str, Any]) -> None: ...

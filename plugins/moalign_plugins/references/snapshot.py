"""The policy as it was some steps ago."""

from __future__ import annotations

from pydantic import Field

from moalign.api import Progress
from moalign_plugins.references._copies import Copies

REGISTRATION = {
    "name": "snapshot",
    "class": "Snapshot",
    "summary": "a copy of the policy that is made anew every so many steps",
}


class Snapshot(Copies):
    """pi_ref is the policy as it was at the last copy; the first is made before the first step.

    A copy is made ``every`` so many steps after the last one, or where responses are sampled in rounds at the first
    round that begins then or later: what is known of a round's responses belongs to one reference.
    """

    every: int = Field(default=100, ge=1)
    """steps between two copies"""

    def due(self, at: Progress, since: int) -> bool:
        return since >= self.every

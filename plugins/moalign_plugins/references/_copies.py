"""References that are the policy as it was some time ago."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moalign.api import Move, Progress, Reference


class Copies(Reference):
    """The policy as it is before the first step, and from then on whenever ``due`` says so."""

    def init(self) -> Mapping[str, Any]:
        return {"step": None}

    def moves(self, at: Progress, state: Mapping[str, Any]) -> tuple[Move | None, Mapping[str, Any]]:
        if state["step"] is None or self.due(at, at.step - state["step"]):
            return Move(), {"step": at.step}
        return None, state

    def due(self, at: Progress, since: int) -> bool:
        """Whether it becomes the policy, ``since`` steps after it last did."""
        raise NotImplementedError

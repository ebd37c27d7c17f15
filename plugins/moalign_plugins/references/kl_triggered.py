"""The policy as it was when it last went too far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from moalign.api import Move, Progress, Reference

REGISTRATION = {
    "name": "kl-triggered",
    "class": "KLTriggered",
    "summary": "a copy of the policy that is made anew where it has moved too far from the last one",
    "paper": "arXiv:2510.18913",
}


class KLTriggered(Reference):
    """pi_ref <- pi where the distance of pi from pi_ref exceeds ``threshold``; one of the anchors of ADPO.

    arXiv 2510.18913 has anchors that a KL triggers; how its distance is estimated, and its threshold, are not stated in
    a source we could read: unverified. Ours is measured with the weights of that moment: on the responses just sampled,
    where both measures estimate KL(pi || pi_ref), or, without rollouts, on the responses in the data that
    are trained on next. There ``kl`` is no KL but the same sum over other responses; it is 0 where both policies agree
    on them and above 0 elsewhere, while ``log-ratio`` has either sign.

    It begins as the policy does. A threshold that is never exceeded leaves it there; with 0 it is the policy of each
    look that finds another.
    """

    threshold: float = Field(default=5.0, ge=0)
    """nats per response"""
    measure: Literal["kl", "log-ratio"] = "kl"
    """kl: mean of the sum over tokens of exp(-a) - 1 + a, never negative; log-ratio: mean of the sum of a, with a the
    token's log pi - log pi_ref"""
    every: int = Field(default=10, ge=1)
    """steps between two looks, each a forward pass of policy and reference; with rounds of sampled responses, at the
    first round that begins then or later"""

    def measures(self, at: Progress, state: Mapping[str, Any]) -> bool:
        return state["step"] is not None and at.step - state["step"] >= self.every

    def init(self) -> Mapping[str, Any]:
        return {"step": None}

    def moves(self, at: Progress, state: Mapping[str, Any]) -> tuple[Move | None, Mapping[str, Any]]:
        if state["step"] is None:
            return Move(), {"step": at.step}
        if not self.measures(at, state):
            return None, state
        distance = at.kl if self.measure == "kl" else at.log_ratio
        far = distance is not None and distance > self.threshold
        return Move() if far else None, {"step": at.step}

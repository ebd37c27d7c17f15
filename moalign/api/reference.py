"""The kind reference: which policy the loss compares with, and how it follows the one that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from moalign.api.plugin import Plugin


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a candidate's training has come, for references that move.

    ``step``: that is trained next, from 0. ``round``: of sampled responses that begins with it, from 0; None where the
    responses are in the data. ``kl``: mean over responses of the sum over tokens of exp(-a) - 1 + a, with a the token's
    log pi - log pi_ref under the policy as it is now; ``log_ratio``: mean over responses of the sum of a. Both in nats
    and None unless the reference ``measures``: over the responses just sampled, where each is an estimate of
    KL(policy || reference), without bias at a temperature and top_p of 1, or over those in the data that are trained on
    next, where none is.
    """

    step: int
    round: int | None = None
    kl: float | None = None
    log_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """A new reference: the base, ``policy`` times what the trained adapter adds to it now, and ``reference`` times what
    the reference so far adds. The default is the policy as it is. Finite numbers; they need not sum to 1."""

    policy: float = 1.0
    reference: float = 0.0


class Reference(Plugin):
    """The policy whose log-probabilities a loss sees as ``ref_logps``: the base with an adapter that nobody trains.

    A reference speaks of adapters by what they add to the base's weights, s B A, layer by layer, and never sees a
    tensor: it says which adapters it begins with and how much of what it moves by. moalign adds up, in that space, so
    that sums of adapters are sums of weights. The products of summed factors A and B would be something else.

    Each candidate has its own, from its first step. What moalign reports as KL stays that from the base.
    """

    fixed: ClassVar[bool] = False
    """whether it never moves; its log-probabilities are then computed once, and kept for all candidates"""

    def check(self, rounds: bool) -> None:
        """Raise ConfigError where the options do not work. Called before a model is loaded. ``rounds``: whether
        responses are sampled in rounds, instead of being in the data."""

    def adapters(self) -> Mapping[str, float]:
        """With which adapters it begins: folders in the peft format, and how much of each; empty: the base itself.

        The shares need not sum to 1: it begins as base + sum of share * s B A.
        """
        return {}

    def largest_rank(self) -> int | None:
        """To which rank a sum is compressed (the nearest in the Frobenius norm) that would have a larger one; what that
        lost stands in the metrics. None: ranks add up, and nothing is lost."""
        return None

    def measures(self, at: Progress, state: Mapping[str, Any]) -> bool:
        """Whether ``moves`` is to be told how far the policy is from the reference by now, which costs passes of both.
        Asked right before it."""
        return False

    def init(self) -> Mapping[str, Any]:
        """The state with which a candidate's training begins, as plain data. Numbers in it are among the metrics, as
        ``reference/NAME``."""
        return {}

    def moves(self, at: Progress, state: Mapping[str, Any]) -> tuple[Move | None, Mapping[str, Any]]:
        """Where it moves before this step is trained (None: it stays), and the state from here on; a new one.

        Asked before each step, but with rounds of sampled responses only before the first step of each: all that is
        known of a round's responses belongs to one reference. A function of its arguments. Not asked where ``fixed``.
        """
        raise NotImplementedError

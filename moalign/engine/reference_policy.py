"""A candidate's reference while it is trained: the base, or an adapter in a slot of its own that follows the policy.

A candidate that is interrupted is trained again from its beginning, so nothing of this outlives its training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moalign import door, lora
from moalign.api import Move, Progress, Reference
from moalign.data.dataset import PairDataset
from moalign.engine.advantages import numbers_in
from moalign.engine.model import LanguageModel
from moalign.engine.scoring import logps_under
from moalign.errors import PluginError, TrainingError, UserError
from moalign.lora import frozen

Distance = Callable[[str | None], tuple[float, float]]


@dataclass(frozen=True)
class FrozenPolicy:
    """The base (``adapter`` None), or it with an adapter in a slot. ``identity`` tells them apart, "" is the base.

    ``fixed``: it stays, so that what is known of its log-probabilities is kept.
    """

    adapter: str | None = None
    identity: str = ""
    fixed: bool = True


BASE = FrozenPolicy()


@dataclass
class MovingReference:
    """One candidate's reference, whose adapter, where it has one of its own, lies in ``slot``; ``policy``: the slot of
    the one that is trained. ``now`` is what it begins with, and then what it has moved to. ``is_policy``: whether it is
    the policy as that was when the reference was last asked."""

    plugin: Reference
    model: LanguageModel
    policy: str
    now: FrozenPolicy = BASE
    candidate: str = ""
    state: Mapping[str, Any] = field(init=False)
    figures: dict[str, float] = field(default_factory=dict)
    is_policy: bool = False
    _moves: int = 0
    _asked_at: int = -1
    _lost: float = 0.0  # a bound on the norm of what compressing has left out so far

    def __post_init__(self) -> None:
        state = self._call("init")
        if not isinstance(state, Mapping):
            raise PluginError(f"{door.origin(self.plugin).who}, in init: it must return a mapping, not {state!r}")
        self.state = state
        self.figures = self._figures()

    @property
    def slot(self) -> str:
        return f"reference-{self.policy}"

    def before(self, step: int, number: int | None, distance: Distance) -> None:
        """Ask where it moves before this step, with which round ``number`` begins (None: there are no rounds).

        Once for each step, also where a round that failed half-way is sampled again.
        ``distance``: of the policy from a frozen adapter (None: the base), as in ``Progress``. Raises PluginError, or
        TrainingError where adapters of this kind cannot be added up.
        """
        if self.plugin.fixed or step == self._asked_at:
            return
        at = Progress(step, number)
        if self._call("measures", at, deepcopy(self.state)):
            kl, log_ratio = distance(self.now.adapter)
            at = replace(at, kl=kl, log_ratio=log_ratio)
            self.figures |= {"reference/kl": kl, "reference/log_ratio": log_ratio}
        move, state = self._checked(self._call("moves", at, deepcopy(self.state)))
        self.is_policy = move is not None and (move.policy, move.reference) == (1.0, 0.0)
        if move is not None and (move.policy, move.reference) != (0.0, 1.0):
            self._move(move)
            self.figures["reference/moved_at"] = float(step)
        self.state, self._asked_at = state, step
        self.figures |= self._figures()

    def _move(self, move: Move) -> None:
        policy = self.model.policy
        lora.add_slots(policy, [self.slot])
        shares = {}
        if move.reference and self.now.adapter is not None:
            shares[self.now.adapter] = move.reference
        if move.policy and not frozen.adds_nothing(policy, self.policy):
            shares[self.policy] = move.policy
        if not shares:
            self.now, self._lost = BASE, 0.0
        else:
            self._fill(shares, move)
            self._moves += 1
            self.now = FrozenPolicy(self.slot, f"{self.slot} {self._moves}", fixed=False)
        self.figures["reference/moves"] = self.figures.get("reference/moves", 0.0) + 1.0

    def _fill(self, shares: Mapping[str, float], move: Move) -> None:
        """Make the slot this sum, and note what has been left out of it, relative to what it is."""
        if shares == {self.policy: 1.0}:
            frozen.duplicate(self.model.policy, self.policy, self.slot)
            self._lost = 0.0
        else:
            try:
                size = frozen.add_up(self.model.policy, self.slot, shares, self._rank())
            except UserError as error:  # this candidate's: another's reference may be a plain copy
                raise TrainingError(f"{door.origin(self.plugin).who}: {error}") from error
            self._lost = abs(move.reference) * self._lost + size.cut
            self.figures["reference/norm"] = size.kept
            self.figures["reference/lost"] = self._lost / size.kept if size.kept else 0.0

    def _rank(self) -> int | None:
        rank = self._call("largest_rank")
        if rank is None or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
            return rank
        raise PluginError(
            f"{door.origin(self.plugin).who}, in largest_rank: {rank!r} is no rank; it is 1 or more, or None"
        )

    def _checked(self, found: Any) -> tuple[Move | None, Mapping[str, Any]]:
        who = f"{door.origin(self.plugin).who}, in moves"
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
            raise PluginError(f"{who}: it must return a Move or None, and the state; it returned {found!r}")
        move, state = found
        if move is not None and not isinstance(move, Move):
            raise PluginError(f"{who}: {type(move).__name__} is no moalign.api.Move")
        if move is not None and not (_is_number(move.policy) and _is_number(move.reference)):
            raise PluginError(f"{who}: {move!r} has what is no number, or is not finite; give two finite numbers")
        return move, state

    def _call(self, hook: str, *arguments: Any) -> Any:
        return door.call(self.plugin, hook, *arguments, candidate=self.candidate)

    def _figures(self) -> dict[str, float]:
        return {f"reference/{name}": value for name, value in numbers_in(self.state)}


def _is_number(share: Any) -> bool:
    return isinstance(share, int | float) and not isinstance(share, bool) and math.isfinite(share)


def distance_on(model: LanguageModel, policy: str, dataset: PairDataset, rows: NDArray[np.int64]) -> Distance:
    """How far the policy in this slot is from a frozen adapter on these responses: see ``Progress``."""

    def distance(adapter: str | None) -> tuple[float, float]:
        sequences, groups = [dataset.sequences[row] for row in rows.tolist()], dataset.groups[rows].tolist()
        reference, own = logps_under(model, sequences, groups, (adapter, policy))
        ratios = [mine.astype(np.float64) - other for mine, other in zip(own, reference, strict=True)]
        kl = float(np.mean([np.sum(np.expm1(-each) + each) for each in ratios]))
        return kl, float(np.mean([each.sum() for each in ratios]))

    return distance

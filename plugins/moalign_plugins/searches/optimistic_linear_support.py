"""The next weights are where most can be gained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moalign.api import Candidate, Outcome, Preference, Search, Space, values
from moalign_plugins.searches._corner_weights import corner_weights, upper_bounds
from moalign_plugins.searches._warm_start import enclosed, warm, warm_mix
from moalign_plugins.searches.grid import Grid

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REGISTRATION = {
    "name": "optimistic-linear-support",
    "class": "OptimisticLinearSupport",
    "summary": "each next candidate where the bound on what can be gained is largest; stops where nothing can be",
    "paper": "arXiv:1610.02707",
}

_PARTS = 1000  # weights are multiples of 1 / _PARTS
_LEAST = 0.02  # of the largest gain: where less is gained, chance decides how large a gap is beside it
_NOTHING = 1e-12  # where nothing is gained anywhere
_MIX = "mix-"  # ids of mixes begin with it: where one model is asked, nothing else tells them apart
_APART = 0.01  # of weights that are tried at once: one of two nearer ones would be enough


class OptimisticLinearSupport(Search):
    """First each objective alone; then the weights with the widest gap between what is reached and what can be.

    What the candidates reach is S(w) = max_k w.v_k, v the mean rewards less the price of KL. What can be reached is at
    most the linear programme's bound U(w), if at the weights already trained nothing better exists than was found. The
    gap U - S is largest at a corner of S (optimistic linear support, Roijers et al., JAIR 2015), and of the corners the
    next is the one with the largest gap beside what is gained there over the untouched model: what is widest in
    rewards lies where an objective counts alone, and the worst served preferences lie between. With warm starts, as in
    arXiv:1610.02707, each such candidate continues the one with the nearest weights and takes few steps. The search
    ends where no gap is above ``tolerance``.
    """

    supposes_weighted_sums: ClassVar[bool] = True

    points: int = Field(default=11, ge=1)
    """at most so many candidates are trained, but one for each objective is"""
    tolerance: float = Field(default=0.005, ge=0)
    """smallest gap that is worth a candidate, as a share of what is gained over the untouched model at its weights"""
    warm_start: Literal["mix", "neighbour"] | None = "mix"
    """start from a mix of the adapters around it, or from the nearest one's, but for each objective alone"""
    warm_steps: float = Field(default=0.15, gt=0, le=1)
    """with warm_start: share of train.steps that the others take"""
    mixes: int = Field(default=0, ge=0)
    """at most so many candidates more, mixed from the trained, where a gap remains when no more are trained"""

    def propose(self, space: Space, history: Sequence[Outcome], rng: Random) -> list[Candidate]:
        tried = [outcome for outcome in history if outcome.preference.kind == "weights"]
        known = [outcome.preference.values for outcome in tried]
        alone = Grid(points=len(space.objectives)).candidates(space)
        if missing := [candidate for candidate in alone if candidate.preference.values not in known]:
            return missing
        settled = [outcome for outcome in tried if outcome.status != "skipped" or _is_mix(outcome)]
        mixed = sum(_is_mix(outcome) for outcome in settled)
        left, at_once = self.points - len(settled) + mixed, max(1, space.together)
        unpaid = [outcome.preference.values for outcome in history if outcome.status == "skipped"]
        ends = [candidate.preference.values for candidate in alone]
        if all(values in ends for values in unpaid):  # the others take fewer steps
            wanted = _instead(alone, tried, space)[: max(0, left)]
            wanted = wanted or self._widest(space, tried, history, min(left, at_once), train=True)
            if wanted:
                return wanted
        return self._widest(space, settled, history, min(self.mixes - mixed, at_once), train=False)

    def reason(self, space: Space) -> str:
        objectives = len(space.objectives)
        if objectives == 1:
            return "there is one objective, so one candidate is all there is"
        most = f"at most {max(self.points, objectives)} trained" + (f" and {self.mixes} mixed" if self.mixes else "")
        return f"each of the {objectives} objectives alone, then where most can be gained, {most}"

    def _candidate(
        self, weights: tuple[float, ...], train: bool, space: Space, history: Sequence[Outcome]
    ) -> Candidate:
        made = _named(weights, space)
        if not train:
            return replace(made, id=f"{_MIX}{made.id}", mixed=True)
        if self.warm_start is None or space.conditioned:
            return made
        return (warm_mix if self.warm_start == "mix" else warm)(made, history, space, self.warm_steps)

    def _widest(
        self, space: Space, tried: Sequence[Outcome], history: Sequence[Outcome], most: int, *, train: bool
    ) -> list[Candidate]:
        """At most so many candidates where the widest gaps worth closing are, the widest first, at none of the weights
        tried already; mixed ones only where there is something to mix."""
        import numpy as np

        done = [outcome for outcome in tried if outcome.status == "done"]
        if not done or most < 1:
            return []
        found = np.array([values(outcome, space) for outcome in done])
        weights = np.array([outcome.preference.vector(space.objectives) for outcome in done])
        best = (weights @ found.T).max(1)
        taken = [outcome.preference.vector(space.objectives) for outcome in tried]
        base = [space.base[name] for name in space.objectives] if space.base else found.min(0).tolist()
        corners = np.unique([_on_grid(corner) for corner in corner_weights(found)], axis=0)
        reached = (corners @ found.T).max(1)
        gaps = upper_bounds(corners, weights, best) - reached
        gains = reached - corners @ np.array(base)
        shares = gaps / np.maximum(gains, max(_LEAST * float(gains.max()), _NOTHING))
        far = np.abs(corners[:, None] - np.array(taken)).max(2).min(1)
        wide = [
            (-round(float(share), 9), -round(float(apart), 9), tuple(corner))
            for share, apart, corner in zip(shares, far, corners.tolist(), strict=True)
            if apart > 0.5 / _PARTS and share > self.tolerance
        ]
        chosen: dict[tuple[float, ...], Candidate] = {}
        for _, _, near in sorted(wide):
            if len(chosen) < most and _distance(near, list(chosen)) > _APART:
                candidate = self._candidate(near, train, space, history)
                if train or enclosed(candidate, history, space):
                    chosen[near] = candidate
        return list(chosen.values())


def _named(weights: Sequence[float], space: Space) -> Candidate:
    digits = len(str(_PARTS)) - 1
    name = "-".join(f"{weight:.{digits}f}" for weight in weights)
    return Candidate(f"ols-{name}", Preference("weights", dict(zip(space.objectives, weights, strict=True))))


def _instead(alone: Sequence[Candidate], tried: Sequence[Outcome], space: Space) -> list[Candidate]:
    """Between the middle and each objective whose own training failed: without one beyond them nothing bends towards
    it. Not warm, for nothing is near."""
    import numpy as np

    known = [outcome.preference.values for outcome in tried]
    failed = [outcome.preference.values for outcome in tried if outcome.status == "failed"]
    lost = [each.preference.vector(space.objectives) for each in alone if each.preference.values in failed]
    made = [_named(_on_grid((np.array(own) + 1 / len(own)) / 2), space) for own in lost]
    return [candidate for candidate in made if candidate.preference.values not in known]


def _is_mix(outcome: Outcome) -> bool:
    return outcome.id.startswith(_MIX)


def _on_grid(weights: NDArray[np.float64]) -> tuple[float, ...]:
    """The nearest multiples of 1 / _PARTS that add up to 1: largest remainders first."""
    whole = [int(weight * _PARTS + 1e-6) for weight in weights]
    short = _PARTS - sum(whole)
    order = sorted(range(len(whole)), key=lambda place: (whole[place] - weights[place] * _PARTS, place))
    for place in order[:short]:
        whole[place] += 1
    return tuple(part / _PARTS for part in whole)


def _distance(weights: Sequence[float], others: Sequence[Sequence[float]]) -> float:
    """To the nearest of the others, in the weight that differs most."""
    return min((max(abs(a - b) for a, b in zip(weights, each, strict=True)) for each in others), default=inf)

"""Rounds that widen the front count more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from moalign.api import Combiner, PluginError, Preference, PreferenceError, Round
from moalign_plugins.combiners._preferences import by_objective, needs_weights
from moalign_plugins.combiners._scalarised import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

REGISTRATION = {
    "name": "dynamic-hypervolume",
    "class": "DynamicHypervolume",
    "summary": "weighted sum, times how much the round's mean rewards widen the front of those before",
    "paper": "arXiv:2509.11452",
}


class DynamicHypervolume(Combiner):
    """sum_k w_k r_k; all advantages times m = 1/2 + 3/2 tanh(HV(front + v) - HV(front)). arXiv 2509.11452.

    v are the round's mean rewards, measured from those of the first round in units of ``scale``, of the objectives with
    weight; it joins the front where it adds volume. The first round has m = 1. A point that is not better than the
    first round in every objective adds nothing (m = 1/2). The paper multiplies rewards, which a loss that standardises
    undoes; advantages keep the factor. It takes v from validation prompts before the step, here it is the round's own.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"groups"})
    weighted_sums: ClassVar[bool] = True

    scale: float | dict[str, float] | None = None
    """what counts as one unit of a reward, one number or one for each objective; without it, the standard deviation
    of the first round's rewards (divisor N - 1)"""

    def check(self, preference: Preference) -> None:
        needs_weights(preference, "dynamic-hypervolume")
        if self.scale is not None:
            scale = by_objective(self.scale, preference, "dynamic-hypervolume", "scale")
            if min(scale) <= 0:
                raise PreferenceError(f"combiner 'dynamic-hypervolume', scale: it must be above 0, not {min(scale):g}")

    def init(self, preference: Preference) -> Mapping[str, Any]:
        scale = None
        if self.scale is not None:
            scale = by_objective(self.scale, preference, "dynamic-hypervolume", "scale")
        counts = [value != 0 for value in preference.values.values()]
        return {"counts": counts, "scale": scale, "front": [], "contribution": 0.0, "multiplier": 1.0}

    def observe(self, state: Mapping[str, Any], seen: Round) -> Mapping[str, Any]:
        scale = state["scale"]
        if scale is None:
            scale = _spread(seen, state["counts"])
        if seen.number == 0:
            return {**state, "scale": scale}
        gains = (seen.rewards.mean(0) - seen.start).tolist()
        units = zip(gains, scale, state["counts"], strict=True)
        contribution, front = widened(state["front"], [gain / unit for gain, unit, counts in units if counts])
        multiplier = 0.5 + 1.5 * math.tanh(contribution)
        return {**state, "scale": scale, "front": front, "contribution": contribution, "multiplier": multiplier}

    def signal(self, rewards: Tensor, preference: Tensor, groups: Tensor, state: Mapping[str, Any]) -> Tensor:
        return weighted_sum(rewards, preference)

    def multiplier(self, state: Mapping[str, Any]) -> float:
        return float(state["multiplier"])


def widened(front: Sequence[Sequence[float]], point: Sequence[float]) -> tuple[float, list[list[float]]]:
    """The volume above the origin that the point adds, and the front with it, without what it dominates.

    Exactly 0, and the front as it was, where a point of the front is at least as good everywhere or the point is not
    above the origin in every objective.
    """
    known = [list(each) for each in front]
    if min(point) <= 0 or any(all(a >= b for a, b in zip(each, point, strict=True)) for each in known):
        return 0.0, known
    joined = [each for each in known if any(a > b for a, b in zip(each, point, strict=True))] + [list(point)]
    return max(_hypervolume(joined) - _hypervolume(known), 0.0), joined


def _hypervolume(points: Sequence[Sequence[float]]) -> float:
    """Above the origin, of points that are above it in every objective."""
    import moocore
    import numpy as np

    return float(moocore.hypervolume(np.array(points), ref=0.0, maximise=True)) if points else 0.0


def _spread(seen: Round, counts: Sequence[bool]) -> list[float]:
    """The standard deviation of each objective; 1 for those without weight, which are not looked at."""
    found = seen.rewards.std(0).tolist() if len(seen.rewards) > 1 else [0.0] * len(counts)
    for index, (spread, wanted) in enumerate(zip(found, counts, strict=True)):
        if wanted and spread <= 0:
            name = seen.objectives[index]
            raise PluginError(f"all responses of the first round have the same {name}; say under scale what counts")
    return [spread if wanted else 1.0 for spread, wanted in zip(found, counts, strict=True)]

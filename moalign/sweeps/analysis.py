"""How good a front is, and what it lacks at most: from its points alone, and from what the best policy would reach.

Of each candidate with weights w the evaluation says what no policy exceeds for w (``optimum``, see engine.optimum),
where a nat of KL has a price, and so do all others' samples (``sweeps.optima``). With three standard errors added, that
bounds every preference between those measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moalign import pareto
from moalign.errors import PreferenceError, RunError
from moalign.sweeps import choice, doubts
from moalign.sweeps.optima import ERRORS, Sampled

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Price:
    """What a nat of KL costs, in rewards; 0: nothing prices it. ``paid``: ids of points whose scores have it paid."""

    value: float = 0.0
    paid: Collection[str] = ()
    why: str | None = None
    """why nothing bounds the front, where that is known"""


def annotate(points: Sequence[dict[str, Any]], names: Sequence[str], reference: Mapping[str, float]) -> None:
    """Say of each point: ``dominated``, ``mixture_dominated``, its ``contribution``, and with whom it is ``alike``."""
    scores = table(points, names)
    kept, mixed = pareto.non_dominated(scores), pareto.mixture_dominated(scores)
    alone = pareto.contributions(scores, [reference[name] for name in names])
    apart = pareto.differ(scores, errors(points, names), scores, errors(points, names))
    ids = [point["id"] for point in points]
    for place, point in enumerate(points):
        point["dominated"] = not bool(kept[place])
        point["mixture_dominated"] = bool(mixed[place])
        point["contribution"] = float(alone[place])
        point["alike"] = [ids[other] for other in range(len(ids)) if other != place and not apart[place, other]]


def analyse(
    front: Mapping[str, Any],
    price: Price,
    optima: Mapping[str, float] | None = None,
    sampled: Mapping[str | None, Sampled] | None = None,
) -> dict[str, Any]:
    """``analysis`` of a front, whose points are annotated already. None stands for what cannot be said.

    ``optima``: by point, what no policy exceeds for its weights; without it what the point itself says of that.
    ``sampled``: by point, and of the untouched base (None), the responses that say how sure their scores are.
    """
    names = [objective["name"] for objective in front["objectives"]]
    scores, weights = table(front["points"], names), pareto.grid(len(names))
    exact = front.get("exact_front")
    some = len(scores) > 0
    why = None if some else "no candidate is finished"
    found, why = (None, why) if why else _bounds(front, names, price, optima or {}, sampled or {})
    return {
        "expected_utility": pareto.expected_utility(scores, weights) if some else None,
        "expected_utility_stderr": utility_error(front["points"], names),
        "sparsity": pareto.sparsity(scores),
        "igd_plus": pareto.igd_plus(scores, table(exact, names)) if exact and some else None,
        "knee": _knee(front),
        "bounds": found,
        "unbounded": why,
    }


def table(points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Array:
    """Scores [n,M] of points."""
    return np.array([[point["scores"][name] for name in names] for point in points]).reshape(-1, len(names))


def errors(points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Array:
    """Standard errors [n,M] of points, 0 where none is known."""
    found = [[point["stderr"].get(name) or 0.0 for name in names] for point in points]
    return np.array(found).reshape(-1, len(names))


def utility_error(points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> float | None:
    """Of the expected utility; None without points, or where one has no standard errors."""
    if not points or any(point["stderr"].get(name) is None for point in points for name in names):
        return None
    return pareto.expected_utility_error(table(points, names), errors(points, names), pareto.grid(len(names)))


def _knee(front: Mapping[str, Any]) -> str | None:
    try:
        return choice.choose(front, choice.Wish(knee=True)).id
    except (PreferenceError, RunError):
        return None


# --- what the front lacks -------------------------------------------------------------------------------------------


def _bounds(
    front: Mapping[str, Any],
    names: Sequence[str],
    price: Price,
    optima: Mapping[str, float],
    sampled: Mapping[str | None, Sampled],
) -> tuple[dict[str, Any] | None, str | None]:
    """What bounds the front, and why something about it cannot be said."""
    if price.why is not None:
        return None, price.why
    if front["base"] is None:
        return None, "the untouched model was not measured"
    measured = [point for point in front["points"] if _optimum(point) is not None]
    points = [point for point in front["points"] if point["kl"] is not None or point["id"] in price.paid]
    if not measured or not points:
        return None, _unmeasured(front["points"])
    reached, base = values(points, names, price), table([front["base"]], names)[0]
    weights = np.array([[point["preference"]["values"][name] for name in names] for point in measured])
    most = np.array([optima.get(point["id"], _optimum(point)) for point in measured])
    most = np.maximum(most, (weights @ np.vstack([reached, base]).T).max(1))
    corner = [front["reference_point"][name] for name in names]
    gap = pareto.gap(reached, base, weights, most, *_doubts(front, points, names, price, sampled))
    missing = [names[place] for place in pareto.unbounded(weights)]
    found = {
        "kl_price": price.value,
        "missing": missing,
        "front_share_at_least": None if gap is None else gap.share,
        "front_share_worst_at_least": None if gap is None else gap.worst,
        "hypervolume_values": pareto.hypervolume(reached, corner),
        "hypervolume_mixtures": pareto.hypervolume_of_mixtures(reached, corner),
        "hypervolume_at_most": pareto.hypervolume_at_most(weights, most, corner),
        "next": {
            "preference": dict(zip(names, gap.weights, strict=True)) if gap else _only(missing[0], names),
            "gain_at_most": None if gap is None else gap.gain,
            "tokens": _tokens(front["points"]),
        },
    }
    return found, None if gap else "no candidate is for " + " alone, none for ".join(missing) + " alone"


def _optimum(point: Mapping[str, Any]) -> float | None:
    """What no policy exceeds for the point's weights."""
    details = point["details"]
    estimate, error = details.get("optimum"), details.get("optimum_stderr")
    if estimate is None or error is None or point["preference"]["kind"] != "weights":
        return None
    return float(estimate + ERRORS * error)


def _unmeasured(points: Sequence[Mapping[str, Any]]) -> str:
    """Why there is no estimate of what can be reached."""
    return (
        "nothing says what the best policies reach: that takes candidates for weights, a reward for every response, "
        "and four of evaluate.samples"
    )


def _doubts(
    front: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    price: Price,
    sampled: Mapping[str | None, Sampled],
) -> tuple[Array, Array]:
    """How much less each point may have [n,W] at each weight of the even grid, and how much more the base [W]; nothing
    where figures are exact."""
    asked = np.array(pareto.grid(len(names)))
    exact = np.zeros(len(asked))
    less = [
        exact
        if point["id"] in price.paid
        else doubts.of_point(point, names, asked, price.value, sampled.get(point["id"]))
        for point in points
    ]
    return np.array(less), exact if price.paid else doubts.of_base(front["base"], names, asked, sampled.get(None))


def values(points: Sequence[Mapping[str, Any]], names: Sequence[str], price: Price) -> Array:
    """Scores [n,M] less the price of KL; nothing is paid where KL was not measured."""
    costs = [0.0 if point["id"] in price.paid else price.value * (point["kl"] or 0.0) for point in points]
    return table(points, names) - np.array(costs)[:, None]


def _only(name: str, names: Sequence[str]) -> dict[str, float]:
    return {other: float(other == name) for other in names}


def _tokens(points: Sequence[Mapping[str, Any]]) -> float | None:
    """Of a training of all steps, or else of whatever was trained; None where nothing was."""
    trained = [point for point in points if point["kind"] == "trained" and point["tokens"]]
    whole = [point for point in trained if "train.steps" not in point["changes"]]
    return float(statistics.median(point["tokens"] for point in whole or trained)) if trained else None

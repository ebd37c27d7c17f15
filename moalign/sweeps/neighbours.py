"""Which trained candidates a wanted preference is made of, and in which shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moalign import preference
from moalign.errors import MoalignError, PreferenceError
from moalign.preference import TOLERANCE
from moalign.types import Outcome, Preference

_SMALLEST = 1e-9  # coefficients below it are the linear programme's rounding


def trained(history: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes that adapters can be mixed from: trained to the end, for weights."""
    return [
        outcome
        for outcome in history
        if outcome.status == "done" and outcome.kind == "trained" and outcome.preference.kind == "weights"
    ]


def shares(wanted: Preference, objectives: tuple[str, ...], history: Sequence[Outcome]) -> dict[str, float]:
    """Trained candidate -> its share; they sum to 1 and, as weights, to ``wanted``: its barycentric coordinates.

    Raises PreferenceError where the trained candidates do not enclose it.
    """
    candidates = trained(history)
    points = [outcome.preference.vector(objectives) for outcome in candidates]
    found = barycentric(wanted.vector(objectives), points)
    return {outcome.id: share for outcome, share in zip(candidates, found, strict=True) if share}


def asked(wanted: Preference, objectives: tuple[str, ...], history: Sequence[Outcome]) -> dict[str, float]:
    """``shares`` for somebody who may ask for anything: the candidate itself where one was trained for just that.

    Raises PreferenceError with what can be had instead.
    """
    for outcome in history:
        own = outcome.preference
        if outcome.status == "done" and outcome.kind == "trained" and _same(own, wanted):
            return {outcome.id: 1.0}
    there = _listed([outcome for outcome in history if outcome.status == "done" and outcome.kind == "trained"])
    if wanted.kind != "weights":
        raise PreferenceError(
            f"no candidate was trained for {preference.format(wanted)}, and between {wanted.kind} adapters are not "
            f"mixed: only weights say how much of each; {there}"
        )
    candidates = trained(history)
    if not candidates:
        raise PreferenceError(f"no candidate was trained for weights, so there is nothing to mix; {there}")
    try:
        return shares(wanted, objectives, history)
    except PreferenceError:
        raise PreferenceError(_beyond(wanted, objectives, candidates)) from None


def _same(one: Preference, other: Preference) -> bool:
    return (
        one.kind == other.kind
        and one.values.keys() == other.values.keys()
        and all(abs(value - other.values[name]) <= TOLERANCE for name, value in one.values.items())
    )


def _beyond(wanted: Preference, objectives: tuple[str, ...], candidates: Sequence[Outcome]) -> str:
    """What the trained candidates enclose, and what of it is nearest to what was wanted."""
    points = [outcome.preference.vector(objectives) for outcome in candidates]
    ranges = [
        f"{name} {min(column):.4g} to {max(column):.4g}"
        for name, column in zip(objectives, zip(*points, strict=True), strict=True)
    ]
    near = _nearest(wanted.vector(objectives), points)
    written = ",".join(f"{name}={value:.9g}" for name, value in zip(objectives, near, strict=True))
    several = len(candidates) > 1
    who = f"the {len(candidates)} trained candidates enclose" if several else "the one trained candidate is for"
    return (
        f"{preference.format(wanted)} lies outside of what {who} "
        f"({', '.join(ranges)}); the nearest that can be mixed is {written}, and beyond it only training leads, such "
        "as for each objective alone"
    )


def _listed(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return "no candidate was trained to the end"
    shown = ", ".join(f"{outcome.id} ({preference.format(outcome.preference)})" for outcome in outcomes[:8])
    more = f" and {len(outcomes) - 8} more" if len(outcomes) > 8 else ""
    return f"name one that was trained: {shown}{more}"


# --- barycentric coordinates ------------------------------------------------------------------------------------------


def barycentric(wanted: Sequence[float], points: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Coefficients c [n], not negative, sum 1, with sum_k c_k ``points``[k] = ``wanted`` (n points, M weights each).

    Of all such c the one with the least sum_k c_k |wanted - points[k]|^2, found by a linear programme: the corners of
    the Delaunay simplex around ``wanted``, so at most M of them, and c moves continuously with ``wanted``. With two
    objectives these are the two neighbours; a point that is among the points is itself, of equal ones the first.

    Raises PreferenceError where a vector is not a weight vector or ``wanted`` lies outside of the hull of the points.
    """
    import numpy as np
    from scipy.optimize import linprog

    target = _weights(wanted, len(wanted), "the wanted weights")
    if not len(points):
        raise PreferenceError("there is no trained candidate to mix")
    everything = np.array([_weights(point, len(wanted), f"point {k}") for k, point in enumerate(points)])
    distinct = np.sort(np.unique(everything, axis=0, return_index=True)[1])
    corners = everything[distinct]
    distances = ((corners - target) ** 2).sum(1)
    system, sides = np.vstack([corners.T, np.ones(len(corners))]), np.append(target, 1.0)
    for tolerance in (1e-10, TOLERANCE):  # weights that people write are rounded, also at the edge of the hull
        options = {"primal_feasibility_tolerance": tolerance, "dual_feasibility_tolerance": 1e-10, "presolve": False}
        found = linprog(distances, A_eq=system, b_eq=sides, method="highs-ds", options=options)
        if found.status == 0:
            break
        if found.status != 2:
            raise MoalignError(f"the mix for {tuple(wanted)} was not found: {found.message}")
    else:
        raise PreferenceError(_outside(tuple(target), corners.min(0), corners.max(0)))
    support = np.flatnonzero(found.x > _SMALLEST)
    shares = np.linalg.lstsq(system[:, support], sides, rcond=None)[0] if len(support) > 1 else 1.0
    coefficients = np.zeros(len(points))
    coefficients[distinct[support]] = shares
    return tuple(coefficients.tolist())


def _nearest(wanted: Sequence[float], points: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The weights in the hull of ``points`` that are nearest to ``wanted``: what ``barycentric`` can be asked for.

    Least squares over the coefficients of the points, which are not negative and sum to 1.
    """
    import numpy as np
    from scipy.optimize import nnls

    corners, heavy = np.array([list(point) for point in points]), 1e4  # the sum counts so much more than the distance
    system = np.vstack([corners.T, np.full(len(corners), heavy)])
    shares, _ = nnls(system, np.append(np.asarray(wanted), heavy))
    return tuple((shares / shares.sum() @ corners).tolist())


def _weights(values: Sequence[float], length: int, what: str) -> list[float]:
    """The vector with its sum, which preferences may miss by TOLERANCE, made exactly 1, or PreferenceError."""
    numbers = [float(value) for value in values]
    if not numbers or len(numbers) != length or not all(0 <= number < math.inf for number in numbers):
        raise PreferenceError(f"{what}: {tuple(values)} is not {length} weights of 0 or more")
    total = math.fsum(numbers)
    if abs(total - 1) > TOLERANCE:
        raise PreferenceError(f"{what}: {tuple(values)} add up to {total:.9g}, not 1")
    return [number / total for number in numbers]


def _outside(wanted: Sequence[float], lowest: Sequence[float], highest: Sequence[float]) -> str:
    """Why there is no mix, with the first weight that goes beyond all candidates where one does."""
    text = f"the weights {tuple(round(float(w), 6) for w in wanted)} lie outside of what the trained candidates enclose"
    for k, (weight, low, high) in enumerate(zip(wanted, lowest, highest, strict=True)):
        if not low - TOLERANCE <= weight <= high + TOLERANCE:
            text += f" (weight {k}: {low:.6g} to {high:.6g})"
            break
    return f"{text}; mixing fills in between candidates: train one beyond it, such as each objective alone"

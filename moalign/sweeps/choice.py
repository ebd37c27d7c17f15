"""Which point of a front to take: bounds that it must keep, and a criterion that decides among those that do.

Scores are those of ``front.json``: larger is better everywhere, objectives to be minimised are negated. A dominated
point is never chosen: where it keeps the bounds, so does the one that dominates it, and no criterion here prefers less.

Each criterion is linear in a point's scores, or is made so around them, so that its standard error follows from those
of the scores; two points are told apart where they differ by more than Z standard errors of the difference, taken as
independent. Points are evaluated on the same prompts, which makes most differences surer than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from moalign import pareto, preference, validation
from moalign.errors import PreferenceError, RunError
from moalign.pareto import Z
from moalign.preference import TOLERANCE
from moalign.types import Preference


@dataclass(frozen=True, slots=True)
class Wish:
    """``at_least``: bounds of the scores. Of the rest exactly one is set.

    ``maximise``: an objective. ``knee``: the point farthest out from the plane through the best of each objective.
    ``nearest``: the ratio in which the gains over the reference point should stand. ``best``: weights of the scores.
    """

    at_least: Mapping[str, float] = field(default_factory=dict)
    maximise: str | None = None
    knee: bool = False
    nearest: Preference | None = None
    best: Preference | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A point's ``id``, and the ``reason`` for it in words.

    ``value``, ``stderr``  what decided, larger is better, and its standard error (None: not known)
    ``met``, ``of``        how many points on the front keep the bounds, and how many are on it
    ``alike``              ids of points that keep the bounds and cannot be told from it by the criterion
    ``notes``              what else chance may have decided
    """

    id: str
    reason: str
    value: float
    stderr: float | None
    met: int
    of: int
    alike: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Rated:
    """A point under the criterion."""

    point: Mapping[str, Any]
    value: float
    stderr: float | None


Numbers = str | Mapping[str, float]  # "harmless=0.9" or {"harmless": 0.9}


def wish(
    front: Mapping[str, Any],
    *,
    at_least: Numbers | None = None,
    at_most: Numbers | None = None,
    maximise: str | None = None,
    knee: bool = False,
    nearest: Numbers | None = None,
    best: str | Mapping[str, Any] | None = None,
) -> Wish:
    """What somebody asks of a front, checked against its objectives. Raises PreferenceError.

    ``at_most`` bounds objectives that are to be minimised, in their own units; all else is in the units of the front.
    Without a criterion, and with one objective that has no bound, that one is maximised.
    """
    names = tuple(objective["name"] for objective in front["objectives"])
    minimised = [objective["name"] for objective in front["objectives"] if objective["direction"] == "min"]
    bounds = _read(at_least, names, "--at-least")
    for name, bound in _read(at_most, names, "--at-most").items():
        if name not in minimised:
            raise PreferenceError(f"--at-most: {name} is to be maximised; write --at-least, or leave it unbounded")
        if name in bounds:
            raise PreferenceError(f"--at-most: {name} has a bound already")
        bounds[name] = -bound
    if sum((maximise is not None, knee, nearest is not None, best is not None)) > 1:
        raise PreferenceError("--maximise, --knee, --nearest and --best exclude each other; choose one of them")
    if maximise is not None:
        if maximise not in names:
            raise PreferenceError(
                f"--maximise: there is no objective '{maximise}'{validation.nearest(maximise, names)}"
            )
        return Wish(bounds, maximise=maximise)
    if knee:
        return Wish(bounds, knee=True)
    if nearest is not None:
        return Wish(bounds, nearest=_direction(_read(nearest, names, "--nearest"), names))
    if best is not None:
        weights = preference.parse(best, names, where="--best")
        if weights.kind != "weights":
            raise PreferenceError(f"--best: {weights.kind} are no weights; write --best helpful=0.7,harmless=0.3")
        return Wish(bounds, best=weights)
    free = [name for name in names if name not in bounds]
    if bounds and len(free) == 1:
        return Wish(bounds, maximise=free[0])
    raise PreferenceError(
        "nothing decides among the points: say --maximise NAME, --knee, --nearest NAME=NUMBER,... "
        "or --best NAME=WEIGHT,..."
    )


def _read(numbers: Numbers | None, names: tuple[str, ...], where: str) -> dict[str, float]:
    if numbers is None or (isinstance(numbers, Mapping) and not numbers):
        return {}
    if isinstance(numbers, str):
        return preference.numbers(numbers, names, where)
    return preference.numbers(",".join(f"{name}={_written(value)}" for name, value in numbers.items()), names, where)


def _written(value: object) -> str:
    """As it would be typed: a text as it stands, and any number, such as numpy's, with all its digits."""
    return repr(float(value)) if isinstance(value, Real) and not isinstance(value, bool) else str(value)


def _direction(numbers: Mapping[str, float], names: tuple[str, ...]) -> Preference:
    """Weights (sum 1) or a vector of length 1, as preferences are written; what is left out is 0."""
    values = {name: numbers.get(name, 0.0) for name in names}
    weights = min(values.values()) >= 0 and abs(math.fsum(values.values()) - 1) <= TOLERANCE
    if not weights and abs(math.hypot(*values.values()) - 1) > TOLERANCE:
        raise PreferenceError(
            f"--nearest: the numbers add up to {math.fsum(values.values()):.6g} and as a vector have length "
            f"{math.hypot(*values.values()):.6g}; write weights, which add up to 1, or a direction, of length 1"
        )
    return Preference("weights" if weights else "direction", values)


def choose(front: Mapping[str, Any], wish: Wish) -> Choice:
    """Pick a point of a front, the content of ``front.json``; a function of these two alone.

    Raises PreferenceError where no point keeps the bounds, with what can be reached, or where the criterion has no
    meaning on this front; RunError where the front is empty.
    """
    names = [objective["name"] for objective in front["objectives"]]
    kept = [point for point in front["points"] if not point["dominated"]]
    if not kept:
        failed = front["failed"]
        why = f"the first of {len(failed)} that failed: {failed[0]['error']}" if failed else "none is finished yet"
        raise RunError(f"the front has no points; {why}")
    meeting = [point for point in kept if _meets(point, wish.at_least)]
    if not meeting:
        raise PreferenceError(_unreachable(kept, wish.at_least, front["objectives"]))
    rated, reason = _rated(front, kept, names, wish)
    able = [one for one in rated if one.point in meeting]
    if not able:
        raise PreferenceError("no point that keeps the bounds can be judged by this criterion")
    best = max(able, key=lambda one: (one.value, [one.point["scores"][name] for name in names]))
    others = [one for one in able if one is not best]
    alike = tuple(one.point["id"] for one in others if _same(best, one))
    bounds = f" among the {len(able)} of {len(kept)} on the front with {_bounds(wish.at_least)}"
    return Choice(
        id=best.point["id"],
        reason=reason + (bounds if wish.at_least else f" among the {len(kept)} on the front"),
        value=best.value,
        stderr=best.stderr,
        met=len(meeting),
        of=len(kept),
        alike=alike,
        notes=tuple(_notes(best, [one for one in rated if one.point not in meeting], wish.at_least)),
    )


# --- bounds ---------------------------------------------------------------------------------------------------------


def _meets(point: Mapping[str, Any], bounds: Mapping[str, float]) -> bool:
    return all(point["scores"][name] >= bound for name, bound in bounds.items())


def _bounds(bounds: Mapping[str, float]) -> str:
    return " and ".join(f"{name} at least {bound:.4g}" for name, bound in bounds.items())


def _told_apart(value: float, other: float) -> tuple[str, str]:
    """Both with four significant digits, or with as many more as make a difference."""
    for digits in range(4, 18):
        said = f"{value:.{digits}g}", f"{other:.{digits}g}"
        if said[0] != said[1]:
            break
    return said


def _unreachable(
    points: Sequence[Mapping[str, Any]], bounds: Mapping[str, float], objectives: Sequence[Mapping[str, Any]]
) -> str:
    """Why no point keeps the bounds: what each reaches alone, or under the other bounds."""
    parts = []
    for name, bound in bounds.items():
        others = {other: value for other, value in bounds.items() if other != name}
        under = [point for point in points if _meets(point, others)]
        if not under:
            continue
        top = max(under, key=lambda point: point["scores"][name])
        given = f" with {_bounds(others)}" if others else ""
        reached, wanted = _told_apart(top["scores"][name], bound)
        parts.append(f"{name} reaches {reached}, not {wanted},{given} ({top['id']})")
    if not parts:
        parts = [
            f"{name} alone reaches {max(point['scores'][name] for point in points):.4g}, wanted is {bound:.4g}"
            for name, bound in bounds.items()
        ]
    negated = [o["name"] for o in objectives if o["direction"] == "min" and bounds.get(o["name"], 0.0) > 0]
    hint = "".join(f"; scores of {name} are negated, --at-most bounds them in their own units" for name in negated)
    return f"no point on the front has {_bounds(bounds)}: {'; '.join(parts).replace(', (', ' (')}{hint}"


# --- criteria -------------------------------------------------------------------------------------------------------


def _rated(
    front: Mapping[str, Any], kept: Sequence[Mapping[str, Any]], names: Sequence[str], wish: Wish
) -> tuple[list[_Rated], str]:
    """Every point on the front under the criterion, and the criterion in words."""
    if wish.maximise is not None:
        return _linear(kept, {wish.maximise: 1.0}), f"the highest {wish.maximise}"
    if wish.best is not None:
        weights = wish.best.values
        text = " + ".join(f"{weight:.4g} {name}" for name, weight in weights.items() if weight)
        return _linear(kept, weights), f"the highest {text}"
    if wish.nearest is not None:
        text = " : ".join(f"{value:.4g}" for value in wish.nearest.values.values())
        named = " : ".join(wish.nearest.values)
        rated = _by_angle(front, kept, names, wish.nearest)
        return rated, f"the gains over the reference point stand nearest to {named} = {text}"
    normal, offset = _plane(kept, names)
    rated = _linear(kept, dict(zip(names, normal, strict=True)), offset)
    if max(one.value for one in rated) <= 1e-9:
        raise PreferenceError(
            "the front has no knee: no point lies outside of the plane through the best of each objective; "
            "choose by --maximise, --best or --nearest"
        )
    return rated, "the knee, farthest out from the plane through the best of each objective,"


def _linear(points: Sequence[Mapping[str, Any]], weights: Mapping[str, float], offset: float = 0.0) -> list[_Rated]:
    """sum_j w_j s_j - offset, with its standard error."""
    rated = []
    for point in points:
        value = math.fsum(weight * point["scores"][name] for name, weight in weights.items()) - offset
        errors = [(weight, point["stderr"].get(name)) for name, weight in weights.items() if weight]
        known = [weight * error for weight, error in errors if error is not None]
        rated.append(_Rated(point, value, math.hypot(*known) if len(known) == len(errors) else None))
    return rated


def _plane(points: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[list[float], float]:
    found = pareto.knee_plane([[point["scores"][name] for name in names] for point in points])
    if found is None:
        raise PreferenceError(
            f"a knee needs three points on the front that differ in every objective; {len(points)} are on it"
        )
    return found


def _by_angle(
    front: Mapping[str, Any], points: Sequence[Mapping[str, Any]], names: Sequence[str], wanted: Preference
) -> list[_Rated]:
    """Minus the angle, in radians, between wanted direction and gains, each gain in units of its objective's range."""
    reference = np.array([front["reference_point"][name] for name in names])
    scores = np.array([[point["scores"][name] for name in names] for point in points])
    everything = np.vstack([scores, reference])
    spread = np.ptp(everything, axis=0)
    spread[spread == 0] = 1.0
    direction = np.array(wanted.vector(tuple(names)))
    direction = direction / np.linalg.norm(direction)
    rated = []
    for point, gains in zip(points, (scores - reference) / spread, strict=True):
        length = float(np.linalg.norm(gains))
        if length == 0:
            continue  # no gain at all has no direction
        along = float(gains @ direction) / length
        across = direction - along * gains / length
        sine = float(np.linalg.norm(across))
        known = [point["stderr"].get(name) for name in names]
        error = None
        if None not in known:
            errors = np.array(known) / spread
            # in the direction itself every way leads away from it: the surest that can be said is the largest error
            error = float(np.linalg.norm(errors * across / sine) if sine > 1e-9 else errors.max()) / length
        rated.append(_Rated(point, -math.atan2(sine, along), error))
    if not rated:
        raise PreferenceError("no point on the front differs from the reference point, so none lies in any direction")
    return rated


# --- chance ---------------------------------------------------------------------------------------------------------


def _same(one: _Rated, other: _Rated) -> bool:
    """Whether the difference may be chance; where no errors are known, whether there is none."""
    if one.stderr is None or other.stderr is None:
        return one.value == other.value
    return abs(one.value - other.value) <= Z * math.hypot(one.stderr, other.stderr)


def _notes(best: _Rated, missing: Sequence[_Rated], bounds: Mapping[str, float]) -> list[str]:
    notes = []
    if best.stderr is None:
        notes.append("the scores have no standard errors, so nothing is said about chance")
    for name, bound in bounds.items():
        error = best.point["stderr"].get(name)
        above = best.point["scores"][name] - bound
        if error is not None and error > 0 and above < Z * error:
            notes.append(f"its {name} is {above:.2g} ± {error:.2g} above {bound:.4g}, which may be chance")
    for one in missing:
        short = {name: bound - one.point["scores"][name] for name, bound in bounds.items()}
        short = {name: by for name, by in short.items() if by > 0}
        errors = {name: one.point["stderr"].get(name) or 0.0 for name in short}
        if one.value > best.value and all(by < Z * errors[name] for name, by in short.items()):
            said = " and ".join(f"{name} by {by:.2g} ± {errors[name]:.2g}" for name, by in short.items())
            notes.append(f"{one.point['id']} would be better and misses {said}, which may be chance")
    return notes

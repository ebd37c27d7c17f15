"""Which trained candidates a wanted preference is made of, and in which shares."""

from __future__ import annotations

from collections.abc import Sequence

from moalign import preference
from moalign.errors import PreferenceError
from moalign.lora import mixing
from moalign.preference import TOLERANCE
from moalign.types import Outcome, Preference


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
    found = mixing.barycentric(wanted.vector(objectives), points)
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
        raise PreferenceError(_outside(wanted, objectives, candidates)) from None


def _same(one: Preference, other: Preference) -> bool:
    return (
        one.kind == other.kind
        and one.values.keys() == other.values.keys()
        and all(abs(value - other.values[name]) <= TOLERANCE for name, value in one.values.items())
    )


def _outside(wanted: Preference, objectives: tuple[str, ...], candidates: Sequence[Outcome]) -> str:
    """What the trained candidates enclose, and what of it is nearest to what was wanted."""
    points = [outcome.preference.vector(objectives) for outcome in candidates]
    ranges = [
        f"{name} {min(column):.4g} to {max(column):.4g}"
        for name, column in zip(objectives, zip(*points, strict=True), strict=True)
    ]
    near = mixing.nearest(wanted.vector(objectives), points)
    written = ",".join(f"{name}={value:.9g}" for name, value in zip(objectives, near, strict=True))
    return (
        f"{preference.format(wanted)} lies outside of what the {len(candidates)} trained candidates enclose "
        f"({', '.join(ranges)}); the nearest that can be mixed is {written}, and beyond it only training leads, such "
        "as for each objective alone"
    )


def _listed(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return "no candidate was trained to the end"
    shown = ", ".join(f"{outcome.id} ({preference.format(outcome.preference)})" for outcome in outcomes[:8])
    more = f" and {len(outcomes) - 8} more" if len(outcomes) > 8 else ""
    return f"name one that was trained: {shown}{more}"

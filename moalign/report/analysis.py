"""What the analysis of a front says, in words: one line about what it lacks, and a short table."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

from moalign.report.wording import measure, number, objective_names, printable

NONE = "none"
SAME = 1e-3  # of weights


def outlook(front: Mapping[str, Any]) -> str | None:
    """How much of the best front this one has at least, and what one more run would bring at most; one line.

    None where ``front.json`` was written before there was an analysis.
    """
    analysis = front.get("analysis")
    if analysis is None:
        return None
    bounds = analysis["bounds"]
    if bounds is None:
        return f"Front share not bounded: {printable(analysis['unbounded'])}"
    following = bounds["next"]
    where = ", ".join(f"{printable(name)}={weight:.4g}" for name, weight in following["preference"].items())
    cost = "" if following["tokens"] is None else f" (about {following['tokens']:,.0f} tokens)"
    if bounds["front_share_at_least"] is None:
        return f"Front share not bounded: {printable(analysis['unbounded'])}; {_bounding(bounds, where, cost)}"
    share, worst = bounds["front_share_at_least"], bounds["front_share_worst_at_least"]
    known = f"Front share at least {_share(share)} (worst preference {_share(worst)})"
    longer = "a longer one " if _trained_at(front, following["preference"]) else ""
    most = _at_most(following["gain_at_most"], 2)
    return f"{known}; one more run, such as {longer}at {where}{cost}, brings at most {most}"


def _bounding(bounds: Mapping[str, Any], where: str, cost: str) -> str:
    """What would bound the share: a run for each objective that no candidate is for alone."""
    missing = bounds.get("missing", [])
    if len(missing) < 2:
        return f"one more run, at {where}{cost}, bounds it"
    return f"{len(missing)} more runs, one for each of these{cost.replace(')', ' each)')}, bound it"


def _trained_at(front: Mapping[str, Any], weights: Mapping[str, float]) -> bool:
    """Whether a candidate was trained for just these weights, so that another like it would bring nothing."""
    trained = [point["preference"]["values"] for point in front["points"] if point["kind"] == "trained"]
    return any(all(abs(values.get(name, 0.0) - w) < SAME for name, w in weights.items()) for values in trained)


def facts(front: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The analysis as (what, value); nothing where there is none."""
    analysis = front.get("analysis")
    if analysis is None:
        return []
    lines = []
    if analysis["expected_utility"] is not None:
        said = measure(analysis["expected_utility"], analysis["expected_utility_stderr"])
        lines.append(("Expected utility", f"{said}, the mean over even weights of the best weighted score"))
    if analysis["sparsity"] is not None:
        lines.append(("Sparsity", f"{number(analysis['sparsity'])}, smaller is denser"))
    if analysis["igd_plus"] is not None:
        lines.append(("IGD+", f"{number(analysis['igd_plus'])} from the exact front"))
    lines.append(("Knee", printable(analysis["knee"] or NONE)))
    lines.append(("Mixtures of others dominate", _mixed(front)))
    lines.append(("Not told apart", _alike(front)))
    return lines + _bounds(front, analysis["bounds"])


def _bounds(front: Mapping[str, Any], bounds: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if bounds is None:
        return []
    mixed, most = bounds["hypervolume_mixtures"], bounds["hypervolume_at_most"]
    more = "not bounded from above" if most is None else f"no front has more than {_at_most(most, 4)}"
    if mixed is None:
        more = "that of mixtures, and a bound, not computed for so many objectives"
    else:
        more = f"with mixtures of them {number(mixed)}; {more}"
    volumes = f"{number(bounds['hypervolume_values'])}; {more}"
    corner = ", ".join(f"{printable(name)} {number(front['reference_point'][name])}" for name in objective_names(front))
    return [
        ("Price of KL", f"{number(bounds['kl_price'])} per nat"),
        ("Hypervolume, KL paid for", f"{volumes}; from {corner}"),
    ]


def _mixed(front: Mapping[str, Any]) -> str:
    beaten = [point["id"] for point in front["points"] if point.get("mixture_dominated") and not point["dominated"]]
    return ", ".join(map(printable, beaten)) or NONE


def _alike(front: Mapping[str, Any]) -> str:
    """Pairs on the front, each once."""
    kept = [point for point in front["points"] if not point["dominated"]]
    ids = [point["id"] for point in kept]
    pairs = [
        f"{printable(point['id'])} and {printable(other)}"
        for place, point in enumerate(kept)
        for other in ids[place + 1 :]
        if other in point.get("alike", ())
    ]
    shown = "; ".join(pairs[:5]) + (f"; and {len(pairs) - 5} more" if len(pairs) > 5 else "")
    return f"{shown}, within 1.96 standard errors" if pairs else NONE


def _share(share: float) -> str:
    """Rounded down: it is said to be at least that."""
    return str(Decimal(repr(float(share))).quantize(Decimal("0.001"), ROUND_FLOOR)) if share > 0 else "0"


def _at_most(value: float, digits: int) -> str:
    """Rounded up to so many digits: it is said to be at most that."""
    return f"{Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(float(value))):.{digits}g}"

"""How numbers, names and preferences are put into words, the same in table, picture and page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def printable(text: object, width: int | None = None) -> str:
    """``text`` without control characters (a name must not steer a terminal), cut to ``width`` with an ellipsis."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))
    return shown if width is None or len(shown) <= width else shown[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def number(value: float | None) -> str:
    """Four significant digits; a dash for what was not measured."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value + 0.0:.4g}".replace("-", "\N{MINUS SIGN}", 1) if abs(value) < 1e15 else f"{value:.3g}"


def measure(value: float, stderr: float | None) -> str:
    """``0.712 ± 0.013``: the error with two significant digits, the value with as many decimals as the error."""
    if stderr is None or not math.isfinite(stderr):
        return number(value)
    decimals = 3 if stderr <= 0 else min(max(1 - math.floor(math.log10(stderr)), 0), 6)
    rounded = f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")
    error = f"{stderr:.{decimals}f}"
    return f"{rounded} ± {error if float(error) or not stderr else f'{stderr:.1g}'}"


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{round(100 * share, 1) + 0.0:.1f} %".replace("-", "\N{MINUS SIGN}")


def objective_names(front: Mapping[str, Any]) -> list[str]:
    """The names of the objectives, in their order."""
    return [objective["name"] for objective in front["objectives"]]


def objective_title(objective: Mapping[str, Any], width: int | None = None) -> str:
    """The name to print; a minimised objective says that its scores are negated."""
    suffix = " (negated)" if objective["direction"] == "min" else ""
    return printable(objective["name"], width) + suffix


def preference_text(preference: Mapping[str, Any], names: Sequence[str]) -> str:
    """Short text of a preference: its values in the order of the objectives, after its name where a user gave one."""
    values = preference["values"]
    if preference["kind"] == "thresholds":
        text = ", ".join(f"{printable(name)} ≥ {number(value)}" for name, value in values.items())
    else:
        text = " / ".join(f"{values.get(name, 0.0):.2f}".replace("-", "\N{MINUS SIGN}") for name in names)
    if preference["kind"] == "direction":
        text = f"→ {text}"
    return text if preference.get("name") in (None, "equal", *names) else f"{printable(preference['name'])} ({text})"


def preference_label(preference: Mapping[str, Any], names: Sequence[str]) -> str:
    """Still shorter, for a picture: the name, or the values."""
    name = preference.get("name")
    return preference_text(preference, names) if name is None else printable(name, 24)


def detail_names(points: Iterable[Mapping[str, Any]]) -> list[str]:
    """All that the details of any point name, in the alphabet's order."""
    return sorted({name for point in points for name in point["details"]})


def standing(point: Mapping[str, Any]) -> str:
    """Whether a point is on the front."""
    return "dominated" if point["dominated"] else "on the front"


def known_world(front: Mapping[str, Any]) -> list[str]:
    """Short facts where the exact front is known: its share, the worst preference's, the ceiling, well-formed mass."""
    if front.get("front_share") is None:
        return []
    share = f"front share {percent(front['front_share'])}"
    if front.get("front_share_worst") is not None:
        share += f" (worst {percent(front['front_share_worst'])})"
    facts = [share]
    ceiling = (front.get("ceiling") or {}).get("front_share")
    if ceiling is not None:
        facts.append(f"ceiling {percent(ceiling)}")
    masses = [point["details"].get("well-formed") for point in front["points"]]
    if masses and None not in masses:
        facts.append(f"well-formed ≥ {percent(min(masses))}")
    return facts


def summary(front: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What there is to say about the front as a whole, as (what, value)."""
    points, failed = front["points"], front["failed"]
    kept = sum(not point["dominated"] for point in points)
    lines = [("Points", f"{len(points)}, {kept} of them on the front" + (f"; {len(failed)} failed" if failed else ""))]
    corner = ", ".join(f"{printable(name)} {number(front['reference_point'][name])}" for name in objective_names(front))
    lines.append(("Hypervolume", f"{number(front['hypervolume'])}, measured from {corner}"))
    ceiling = front.get("ceiling") or {}
    for key, title in (
        ("front_share", "Front share"),
        ("front_share_worst", "Worst served preference"),
        ("hypervolume_share", "Hypervolume share"),
    ):
        if front.get(key) is not None:
            limit = f" (this model's ceiling: {percent(ceiling[key])})" if ceiling.get(key) is not None else ""
            lines.append((title, percent(front[key]) + limit))
    if front.get("skipped"):
        count = len(front["skipped"])
        lines.append(("Skipped", f"{count} candidate{'s' * (count > 1)} did not fit into the budget"))
    in_vain = sum(entry.get("tokens", 0) for entry in failed)
    spent = f"{sum(point['tokens'] for point in points):,}"
    lines.append(("Tokens", spent + (f", and {in_vain:,} of failed candidates" if in_vain else "")))
    evaluation = printable(front["evaluation"]).rstrip(". ")
    lines.append(("Scores", f"{evaluation[:1].upper()}{evaluation[1:]}. Larger is better everywhere."))
    return lines

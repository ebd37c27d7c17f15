"""Figures along the candidates of a run, or along one's training: curves of reward over KL, and alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moalign import storage
from moalign.diagnostics import mismatch, overoptimisation
from moalign.diagnostics.measurement import BASE
from moalign.diagnostics.mismatch import Series
from moalign.errors import CorruptFileError
from moalign.sweeps import journal
from moalign.sweeps.archive import Archive


def of_run(archive: Archive, chosen: Sequence[str], found: Mapping[str, Any]) -> dict[str, Any]:
    """``curves`` by reward and ``alarms``, from the policies that were run (in ``found``), else from the journal."""
    points = _points(archive, chosen, found)
    return {
        "points": points,
        "curves": {name: _curve(points, name) for name in _rewards(points)},
        "alarms": _over_candidates(points, found) + _over_training(archive, chosen, found),
    }


def _points(archive: Archive, chosen: Sequence[str], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """(id, kl, rewards) of the base and the candidates, those nearest to the base first."""
    told: Mapping[str, Any] = found["policies"]
    if told and told[BASE].get("kl") is not None:
        points = [
            {"id": name, "kl": each["kl"], "rewards": {key: value for key, value in each["rewards"].items() if value}}
            for name, each in told.items()
        ]
    else:
        points = _from_journal(archive, chosen)
    return sorted(points, key=lambda point: (point["id"] != BASE, point["kl"]))


def _from_journal(archive: Archive, chosen: Sequence[str]) -> list[dict[str, Any]]:
    """As the run evaluated them; without standard errors where the scores are no rewards."""
    names = archive.config.objective_names
    events = journal.of_run(archive.directory)
    base = next((event for event in events if event["event"] == "base"), None)
    measured = [] if base is None else [(BASE, 0.0, base["details"], base["stderr"])]
    measured += [
        (each.id, each.kl, each.details, each.stderr)
        for each in archive.history
        if each.id in chosen and each.kl is not None
    ]
    generated = archive.record.get("evaluation") == "generate"
    return [
        {
            "id": name,
            "kl": kl,
            "rewards": {
                key: {"value": details[f"{key}/reward"], "stderr": stderr.get(key) if generated else None}
                for key in names
                if f"{key}/reward" in details
            },
        }
        for name, kl, details, stderr in measured
    ]


def _rewards(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that the base and another have."""
    first = points[0]["rewards"] if points and points[0]["id"] == BASE else {}
    return [name for name in first if any(name in point["rewards"] for point in points[1:])]


def _curve(points: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Of the gain over the base."""
    measured = [point for point in points[1:] if name in point["rewards"]]
    base = points[0]["rewards"][name]["value"]
    x = [math.sqrt(max(0.0, point["kl"])) for point in measured]
    curve, note = overoptimisation.fit(x, [point["rewards"][name]["value"] - base for point in measured])
    if below := sum(point["kl"] <= 0 for point in measured):
        note += f"; {below} with an estimate of KL not above 0 left out"
    if curve is None:
        return {"a": None, "b": None, "residual": None, "points": 0, "peak_kl": None, "peak_gain": None, "note": note}
    peak = curve.peak
    told = {"peak_kl": None if peak is None else peak**2, "peak_gain": None if peak is None else curve.b * peak}
    return asdict(curve) | told | {"note": note}


def _over_candidates(points: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of proxies against the gold reward, over the candidates by KL."""
    told = []
    for proxy in found["proxies"]:
        both = [point for point in points if {proxy, found["gold"]} <= point["rewards"].keys()]
        series = [
            Series.of(
                [point["rewards"][name]["value"] for point in both],
                [point["rewards"][name]["stderr"] for point in both],
            )
            for name in (proxy, found["gold"])
        ]
        if (raised := mismatch.alarm(*series)) is not None:
            where = [both[raised.start]["id"], both[raised.end]["id"]]
            told.append(_told("candidates by KL", proxy, found["gold"], where, raised))
    return told


def _over_training(archive: Archive, chosen: Sequence[str], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Along each candidate's training: what its implicit reward prefers against how it ranks, preference accuracy
    against the held-out loss, and proxies against the gold reward."""
    told = []
    for candidate in chosen:
        rows = _metrics(archive, candidate)
        for rising, falling, sign in _watched(archive.config.objective_names, found):
            both = [row for row in rows if _is_number(row.get(rising)) and _is_number(row.get(falling))]
            if not both:
                continue
            risen = mismatch.blocks([row[rising] for row in both])
            fallen = mismatch.blocks([sign * row[falling] for row in both])
            if (raised := mismatch.alarm(risen, fallen)) is not None:
                edges = [both[len(both) * place // len(risen.values)]["step"] for place in (raised.start, raised.end)]
                what = falling if sign > 0 else f"minus {falling}"
                told.append(_told(f"training of {candidate}", rising, what, [f"step {edge}" for edge in edges], raised))
    return told


def _watched(objectives: Sequence[str], found: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(what rises, what falls, the sign with which it is good)."""
    watched = [(f"{name}/accuracy", f"{name}/ranking_accuracy", 1.0) for name in objectives]
    watched += [(f"{name}/accuracy", "held_out_loss", -1.0) for name in objectives]
    return watched + [(f"{proxy}/reward", f"{found['gold']}/reward", 1.0) for proxy in found["proxies"]]


def _told(along: str, rising: str, falling: str, where: Sequence[str], raised: mismatch.Alarm) -> dict[str, Any]:
    return {
        "along": along,
        "rising": rising,
        "falling": falling,
        "from": where[0],
        "to": where[1],
        "rise": raised.rise,
        "fall": raised.fall,
    }


def _metrics(archive: Archive, candidate: str) -> list[dict[str, Any]]:
    """The training metrics of a candidate; none where it was not trained."""
    file = archive.directory / "candidates" / candidate / "metrics.jsonl"
    if not file.exists():
        return []
    try:
        rows = [storage.parse_json(line) for line in storage.read_bytes(file).splitlines()]
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{file}: a line is not the metrics that were written here") from error
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

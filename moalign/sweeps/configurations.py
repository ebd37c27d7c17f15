"""What hyper-parameters are worth: the hypervolume of the front that each configuration of them led to, by seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from moalign import pareto

SEED = "seed"


def compare(
    points: Sequence[Mapping[str, Any]], objectives: Sequence[str], reference: Mapping[str, float], seed: int
) -> list[dict[str, Any]]:
    """The configurations among the points of a front, in the order first met; none where there are fewer than two.

    Points that share all changes but the seed are of one configuration; those that were not trained from fresh weights
    belong to none. ``hypervolume`` is the mean over its seeds, ``stddev`` their deviation (None for one seed); a point
    that failed is not there. Where the configuration without changes has only some of the seeds, those chose nothing:
    ``held_out`` is the mean over them, ``held_out_stddev`` its deviation, and ``hypervolume`` that over the others,
    None without any. ``seed``: of the run, for points without one.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        if point["kind"] == "trained" and not point["parents"]:
            groups.setdefault(json.dumps(_without_seed(point["changes"]), sort_keys=True), []).append(point)
    if len(groups) < 2:
        return []
    corner = [reference[name] for name in objectives]
    volumes = {key: _by_seed(members, objectives, corner, seed) for key, members in groups.items()}
    every = {one for found in volumes.values() for one in found}
    held_out = set(volumes.get("{}", {}))
    held_out = held_out if held_out < every else set()
    return [
        {
            "changes": _without_seed(members[0]["changes"]),
            "seeds": list(volumes[key]),
            "points": len(members),
            **_summary([value for one, value in volumes[key].items() if one not in held_out], "hypervolume", "stddev"),
            **_summary(
                [value for one, value in volumes[key].items() if one in held_out], "held_out", "held_out_stddev"
            ),
        }
        for key, members in groups.items()
    ]


def _without_seed(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if key != SEED}


def _by_seed(
    points: Sequence[Mapping[str, Any]], objectives: Sequence[str], corner: Sequence[float], seed: int
) -> dict[int, float]:
    scores = [[point["scores"][name] for name in objectives] for point in points]
    seeds = [point["changes"].get(SEED, seed) for point in points]
    found = pareto.hypervolumes(scores, seeds, corner)
    return {one: found[one] for one in sorted(set(seeds))}


def _summary(values: Sequence[float], mean: str, deviation: str) -> dict[str, float | None]:
    return {mean: fmean(values) if values else None, deviation: stdev(values) if len(values) > 1 else None}

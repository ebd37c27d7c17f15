"""What hyper-parameters are worth: the hypervolume of the front that each configuration of them led to, by seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from moalign import pareto
from moalign.types import Outcome

SEED = "seed"


def compare(
    history: Sequence[Outcome], worth: Mapping[str, Sequence[float]], reference: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """The configurations among the candidates of a run, in the order first met; none where there are fewer than two.

    Candidates that share all changes but the seed are of one configuration; those that were not trained from fresh
    weights, or not at all for want of a budget, belong to none. ``worth``: by id, the value of each that is done, in
    every objective: its score less the price of its KL. ``hypervolume`` is the mean over the seeds, 0 for one of which
    all failed, ``stddev`` their deviation (None for one seed). Seeds that were not for all configurations with changes
    chose nothing: ``held_out`` is the mean over them, ``held_out_stddev`` its deviation, and ``hypervolume`` that over
    the others, None without any. ``seed``: of the run, for candidates without one.
    """
    groups: dict[str, list[Outcome]] = {}
    for outcome in history:
        if outcome.kind == "trained" and not outcome.parents:
            groups.setdefault(json.dumps(_without_seed(outcome.changes), sort_keys=True), []).append(outcome)
    held_out = _held_out({key: {_seed(one, seed) for one in members} for key, members in groups.items()})
    paid = [[one for one in members if one.status != "skipped"] for members in groups.values()]
    tried = [members for members in paid if members]
    if len(tried) < 2:
        return []
    return [_compared(members, worth, reference, seed, held_out) for members in tried]


def _held_out(seeds: Mapping[str, set[int]]) -> set[int]:
    """Of the seeds by configuration, those that not all with changes were to have; none where they share no seed."""
    changed = [found for key, found in seeds.items() if key != "{}"]
    shared = set.intersection(*changed) if changed else set()
    return set().union(*seeds.values()) - shared if shared else set()


def _compared(
    members: Sequence[Outcome],
    worth: Mapping[str, Sequence[float]],
    reference: Sequence[float],
    seed: int,
    held_out: set[int],
) -> dict[str, Any]:
    done = [one for one in members if one.id in worth]
    found = pareto.hypervolumes([list(worth[one.id]) for one in done], [_seed(one, seed) for one in done], reference)
    volumes = {one: found.get(one, 0.0) for one in sorted({_seed(each, seed) for each in members})}
    chose = [volume for one, volume in volumes.items() if one not in held_out]
    confirmed = [volume for one, volume in volumes.items() if one in held_out]
    return {
        "changes": _without_seed(members[0].changes),
        "seeds": list(volumes),
        "points": len(done),
        **_summary(chose, "hypervolume", "stddev"),
        **_summary(confirmed, "held_out", "held_out_stddev"),
    }


def _without_seed(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if key != SEED}


def _seed(outcome: Outcome, run: int) -> int:
    return int(outcome.changes.get(SEED, run))


def _summary(values: Sequence[float], mean: str, deviation: str) -> dict[str, float | None]:
    return {mean: fmean(values) if values else None, deviation: stdev(values) if len(values) > 1 else None}

"""Runs of the same objectives beside each other: measures from one reference point, their spread, what they attain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from moalign import pareto
from moalign.errors import RunError
from moalign.pareto import Z
from moalign.sweeps import analysis
from moalign.sweeps.front import EVALUATIONS

MEASURES = ("hypervolume", "igd_plus", "expected_utility", "sparsity")


def compare(fronts: Mapping[str, Mapping[str, Any]], reference: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What ``moalign compare --json`` prints, of the contents of ``front.json`` by the runs' names, at least two.

    ``reference``: of the hypervolume, for all; without it the one that all fronts have. IGD+ is the distance from the
    non-dominated points of all runs together. Raises RunError where the runs cannot be compared.
    """
    if len(fronts) < 2:
        raise RunError("one run alone compares with nothing; name at least two")
    objectives = _objectives(fronts)
    _check_evaluations(fronts)
    names = [objective["name"] for objective in objectives]
    for run, front in fronts.items():
        if not front["points"]:
            raise RunError(f"{run}: no candidate is finished, so there is nothing to compare")
    corner = _reference(fronts, reference, names)
    tables = {run: analysis.table(front["points"], names) for run, front in fronts.items()}
    together = np.vstack(list(tables.values()))
    joint = np.unique(together[pareto.non_dominated(together)], axis=0)
    runs = [_run(run, fronts[run], tables[run], joint, corner, names) for run in fronts]
    surfaces = pareto.attainment([table[pareto.non_dominated(table)] for table in tables.values()])
    return {
        "objectives": objectives,
        "reference_point": dict(zip(names, corner, strict=True)),
        "runs": runs,
        "bands": {measure: _band([run[measure] for run in runs]) for measure in MEASURES},
        "attainment": None if surfaces is None else {level: points.tolist() for level, points in surfaces.items()},
        "pairs": [
            _pair(one, other, fronts[one["run"]], fronts[other["run"]], names) for one, other in combinations(runs, 2)
        ],
    }


def _objectives(fronts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Those of all runs, by name and direction."""
    said = {
        run: [{"name": each["name"], "direction": each["direction"]} for each in front["objectives"]]
        for run, front in fronts.items()
    }
    (first, wanted), *others = said.items()
    for run, found in others:
        if found != wanted:
            raise RunError(f"{first} has the objectives {_listed(wanted)}, {run} has {_listed(found)}; they must agree")
    return wanted


def _check_evaluations(fronts: Mapping[str, Mapping[str, Any]]) -> None:
    """Rewards, sampled or exact, with rewards, and accuracies with accuracies."""
    accuracy = EVALUATIONS["preference"]
    kinds = {front["evaluation"] == accuracy: run for run, front in fronts.items()}
    if len(kinds) > 1:
        rewards = fronts[kinds[False]]["evaluation"]
        raise RunError(
            f"the scores of {kinds[True]}: {accuracy}; of {kinds[False]}: {rewards}. Such scores do not compare; "
            "give both the same evaluate.kind"
        )


def _listed(objectives: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(f"{each['name']} ({each['direction']})" for each in objectives)


def _reference(
    fronts: Mapping[str, Mapping[str, Any]], given: Mapping[str, float] | None, names: Sequence[str]
) -> list[float]:
    if given is not None:
        if missing := [name for name in names if name not in given]:
            raise RunError(f"--reference: nothing for {', '.join(missing)}; give one number per objective")
        return [float(given[name]) for name in names]
    said = {run: [front["reference_point"][name] for name in names] for run, front in fronts.items()}
    (first, wanted), *others = said.items()
    for run, found in others:
        if found != wanted:
            points = [
                ",".join(f"{name}={value:.4g}" for name, value in zip(names, each, strict=True))
                for each in (wanted, found)
            ]
            raise RunError(
                f"{first} is measured from {points[0]}, {run} from {points[1]}; volumes from different points "
                f"cannot be compared, so give one for all, such as --reference {points[0]}"
            )
    return wanted


def _run(
    run: str,
    front: Mapping[str, Any],
    scores: analysis.Array,
    joint: analysis.Array,
    corner: Sequence[float],
    names: Sequence[str],
) -> dict[str, Any]:
    return {
        "run": run,
        "points": len(scores),
        "on_front": int(pareto.non_dominated(scores).sum()),
        "hypervolume": pareto.hypervolume(scores, corner),
        "igd_plus": pareto.igd_plus(scores, joint),
        "expected_utility": pareto.expected_utility(scores, pareto.grid(len(names))),
        "expected_utility_stderr": analysis.utility_error(front["points"], names),
        "sparsity": pareto.sparsity(scores),
        "tokens": sum(point["tokens"] for point in front["points"]),
    }


def _band(values: Sequence[float | None]) -> dict[str, float | None] | None:
    """None where a run has no such figure."""
    known = [value for value in values if value is not None]
    return pareto.band(known) if len(known) == len(values) else None


def _pair(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    front: Mapping[str, Any],
    other_front: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """``difference`` of the expected utilities, ``differ``: whether it is beyond chance (None: no errors are known).
    ``points``: of the candidates for one preference in both, whether they differ in any objective."""
    errors = (one["expected_utility_stderr"], other["expected_utility_stderr"])
    difference = one["expected_utility"] - other["expected_utility"]
    stderr = None if None in errors else float(np.hypot(*errors))
    return {
        "runs": [one["run"], other["run"]],
        "difference": difference,
        "stderr": stderr,
        "differ": None if stderr is None else bool(abs(difference) > Z * stderr),
        "points": _matched(front["points"], other_front["points"], names),
    }


def _matched(
    points: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The first candidate for each preference that both have."""
    there: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for point in reversed(others):
        there[_preference(point)] = point
    matched: dict[tuple[Any, ...], tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for point in points:
        key = _preference(point)
        if key in there and key not in matched:
            matched[key] = (point, there[key])
    return [{"ids": [one["id"], two["id"]], "differ": _differ(one, two, names)} for one, two in matched.values()]


def _differ(one: Mapping[str, Any], two: Mapping[str, Any], names: Sequence[str]) -> bool:
    sides = ([one], [two])
    (first, first_error), (second, second_error) = (
        (analysis.table(side, names), analysis.errors(side, names)) for side in sides
    )
    return bool(pareto.differ(first, first_error, second, second_error)[0, 0])


def _preference(point: Mapping[str, Any]) -> tuple[Any, ...]:
    preferred = point["preference"]
    values = sorted((name, round(value, 9)) for name, value in preferred["values"].items())
    return (preferred["kind"], *values)

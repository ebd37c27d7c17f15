"""The tables of ``benchmarks.online``: shares along the way, time of a step, samples per second."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import measure, tables
from benchmarks.online_run import FIRST, SECOND
from benchmarks.online_speed import ENGINES, TRL

Results = Sequence[Mapping[str, Any]]
FIXED = "fixed weights"
TITLES = {FIRST: "First world: share of the exact front", SECOND: "Second world: share of the optimal utility"}
ABOUT = (
    "First world: helpful and harmless; of what the best policy gains over the base, how much the best of the trained "
    "ones gains, mean and least (worst) over even preferences. Second world: brilliant and impeccable, their cubes, "
    "whose good replies lie in a concave middle; of what the best policy gains in E[min_j r_j / t_j] - beta KL, how "
    "much the best of the trained ones gains, mean and least over three targets t. All by enumeration of every reply "
    "to the held-out prompts, after so many steps of one training with a constant learning rate after the warm-up. "
    "± is the standard error over seeds. Tokens: of responses, over all candidates of the one pass."
)


def text_of(report: Mapping[str, Any]) -> str:
    return tables.markdown("Online training: who reaches what, and how fast", report, [ABOUT], tables_of(report))


def tables_of(report: Mapping[str, Any]) -> list[tables.Table]:
    """A table of shares for each world, length and set of further changes; then what was timed."""
    results, made = report["results"], []
    for world in (FIRST, SECOND):
        of_world = [found for found in results if found["part"] == "rules" and found["world"] == world]
        for key in dict.fromkeys(map(_key, of_world)):
            alike = [found for found in of_world if _key(found) == key]
            made += [_shares(world, alike, report["not_run"]), *_domination(world, alike)]
    made += [_step(found) for found in results if found["part"] == "step"]
    made += [_speed(found) for found in results if found["part"] == "speed"]
    return made


def _key(found: Mapping[str, Any]) -> tuple[Any, ...]:
    return found["steps"], found["number_of_looks"], tuple(found["further"])


def _shares(world: str, founds: Results, not_run: Sequence[str]) -> tables.Table:
    ways, rows = _ways(founds), []
    for (loss, rule), mine in ways.items():
        fixed = ways.get((loss, FIXED), [])
        last = [found["looks"][-1] for found in mine]
        along = zip(*(found["looks"] for found in mine), strict=True)
        rows.append(
            [
                f"{loss}, {rule}",
                *(f"{statistics.mean(look['share'] for look in looks):.3f}" for looks in along),
                mean([look["share"] for look in last]),
                mean([look["worst"] for look in last]),
                "" if rule == FIXED else _difference(mine, fixed),
                "" if rule == FIXED else _reached(mine, fixed),
                f"{statistics.mean(look['tokens'] for look in last) / 1000:,.0f}",
                f"{statistics.mean(statistics.mean(look['kl']) for look in last):.2f}",
                f"{statistics.mean(min(look['mass']) for look in last):.3f}",
            ]
        )
    marks = [look["step"] for look in founds[0]["looks"]]
    columns = (
        "loss, rule",
        *(f"step {mark}" for mark in marks),
        "at the end",
        "worst served",
        "against fixed weights, same seeds",
        "steps to the share that these end with",
        "thousand tokens",
        "KL, nats",
        "least well-formed",
    )
    title = TITLES[world] + "".join(f", {change}" for change in founds[0]["further"])
    return tables.Table(title, columns, rows, [*_notes(world, founds, ways), *not_run])


def _domination(world: str, founds: Results) -> list[tables.Table]:
    """Who dominates whom, candidate by candidate: what arXiv 2509.11452 claims of weights that move."""
    ways = _ways(founds)
    rows = []
    for (loss, rule), mine in ways.items():
        fixed = {found["seed"]: found for found in ways.get((loss, FIXED), ())}
        both = [(found, fixed[found["seed"]]) for found in mine if rule != FIXED and found["seed"] in fixed]
        if not both:
            continue
        along = zip(*(zip(own["looks"], other["looks"], strict=True) for own, other in both), strict=True)
        rows.append([f"{loss}, {rule}", *map(_counted, along)])
    marks = [look["step"] for look in founds[0]["looks"]]
    title = f"{world.capitalize()} world: expected rewards, candidates that dominate / are dominated by fixed weights"
    note = (
        "Per cent of the candidates of all seeds, each against the one with the same preference, seed and step that "
        "fixed weights have trained; the others are better in one objective and worse in another."
    )
    return [tables.Table(title, ("loss, rule", *(f"step {mark}" for mark in marks)), rows, [note])] if rows else []


def _counted(looks: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """Of all candidates of all seeds, how many dominate the other's, and how many are dominated by it."""
    pairs = [pair for own, other in looks for pair in zip(own["expected"], other["expected"], strict=True)]
    wins = sum(_dominates(own, other) for own, other in pairs)
    losses = sum(_dominates(other, own) for own, other in pairs)
    return f"{100 * wins / len(pairs):.0f} / {100 * losses / len(pairs):.0f}"


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return tuple(one) != tuple(other) and all(a >= b for a, b in zip(one, other, strict=True))


def _ways(founds: Results) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """What was found, by loss and rule, each in the order of the seeds."""
    ways: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for found in sorted(founds, key=lambda found: found["seed"]):
        ways.setdefault((found["loss"], found["rule"]), []).append(found)
    return ways


def _notes(world: str, founds: Results, ways: Mapping[tuple[str, str], Results]) -> list[str]:
    notes = []
    if len({tuple(found["seed"] for found in mine) for mine in ways.values()}) > 1:
        notes.append("Not every way was run on every seed: means differ by that too, the differences do not.")
    if world == SECOND:
        most = founds[0]["most_of_linear"]
        best, reach = statistics.mean(most), ", ".join(f"{share:.3f}" for share in most)
        notes.append(
            f"The exact optimum for linear weights, the best of all weights and prices of KL: {best:.3f} "
            f"({reach} for the targets). A training that does not arrive at it may have more."
        )
    for loss, rule in ways:
        first = ways[loss, rule][0]
        last = {change.partition("=")[0]: change for change in first["own_changes"]}  # of one key the last one counts
        changes = ", ".join(f"`{change}`" for change in last.values())
        notes.append(f"{loss}, {rule}: `combine: {first['combine']['name']}`" + (f", {changes}" if changes else ""))
    return notes


def mean(values: Sequence[float], kind: str = ".3f") -> str:
    """Mean and its standard error over the seeds."""
    text = format(statistics.mean(values), kind)
    return f"{text} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else text


def _difference(mine: Results, fixed: Results) -> str:
    theirs = {found["seed"]: found["looks"][-1]["share"] for found in fixed}
    both = [found["looks"][-1]["share"] - theirs[found["seed"]] for found in mine if found["seed"] in theirs]
    return mean(both, "+.3f") if both else ""


def _reached(mine: Results, fixed: Results) -> str:
    """The first look, on average over the seeds that both have, that is as good as the end of the fixed weights."""
    seeds = {found["seed"] for found in mine} & {found["seed"] for found in fixed}
    if not seeds:
        return ""
    goal = statistics.mean(found["looks"][-1]["share"] for found in fixed if found["seed"] in seeds)
    along = zip(*(found["looks"] for found in mine if found["seed"] in seeds), strict=True)
    for looks in along:
        if statistics.mean(look["share"] for look in looks) >= goal:
            return str(looks[0]["step"])
    return "never"


def _step(found: Mapping[str, Any]) -> tables.Table:
    seconds, number = found["seconds"], found["candidates"]
    alone = seconds["one by one"]
    rows = [
        [
            f"{number} candidates, {way}",
            f"{statistics.median(times) * measure.MILLISECONDS:.0f}",
            "" if times is alone else str(measure.Ratio.of(times, alone)),
        ]
        for way, times in seconds.items()
    ]
    columns = ("how", "ms for a step of all, sampling among it", "of one by one (quartiles)")
    return tables.Table("Time of an online step", columns, rows, [f"Loss {found['loss']}, a round each step."])


def _speed(found: Mapping[str, Any]) -> tables.Table:
    turns, task = found["turns"], found["work"]
    rows = []
    for engine in ENGINES:
        mine = [each["samples_per_second"] for each in turns[engine]]
        ratio = measure.Ratio.of(mine, [each["samples_per_second"] for each in turns[TRL]])
        tokens = statistics.mean(each["tokens_per_sample"] for each in turns[engine])
        rows.append([engine, f"{statistics.median(mine):.1f}", f"{tokens:.1f}", "" if engine == TRL else str(ratio)])
    work = f"{task['prompts']} prompts x {task['samples']} samples, one update a round"
    settings = ", ".join(f"{name}={value}" for name, value in turns[TRL][0]["settings"].items())
    loss = turns[ENGINES[0]][0]["loss"]
    return tables.Table(
        f"Samples per second, {work}; allocator: {found['allocator']}",
        ("engine", "samples/s", "tokens a sample", "times TRL's (quartiles)"),
        rows,
        [f"moalign: loss {loss}, reference and old log-probabilities computed anew.", f"TRL's GRPOTrainer: {settings}"],
    )

"""What ``moalign sweep --dry-run`` prints."""

from __future__ import annotations

from rich.console import Console

from moalign import preference
from moalign.progress import duration
from moalign.report.table import summary_table
from moalign.sweeps.budget import begun, refuse
from moalign.sweeps.estimate import Estimate, estimate
from moalign.sweeps.observe import Observer
from moalign.sweeps.plan import Plan


def show(plan: Plan, observer: Observer, console: Console) -> None:
    """Probe and print the plan; nothing is written."""
    cost = estimate(plan, observer)
    config = plan.config
    lines = [("model", config.model.path), ("data", config.data_paths[0])]
    method = f"loss {config.loss.name}, combine {config.combine.name}, search {config.search.name}"
    method += f", condition {config.condition.name}" if config.condition else ""
    lines.append(("method", method + (f", reference {config.reference.name}" if config.reference else "")))
    if cost.reason:
        lines.append(("search", cost.reason))
    lines.append(("evaluation", plan.evaluation_kind))
    lines += [("", f"{reason}: {count}") for reason, count in sorted(cost.counts.items())]
    trained = len(cost.steps)
    asked = "" if trained == len(cost.candidates) else f", {trained} of them trained"
    first = " in the first proposal; the search goes on from what they reach" if cost.goes_on else ""
    lines.append(("candidates", f"{len(cost.candidates)}{asked}{first}"))
    lines += [("", preference.format(candidate.preference)) for candidate in cost.candidates]
    lines.append(("steps", " or ".join(f"{steps:,}" for steps in sorted(set(cost.steps))) + " each"))
    alone = f"; one by one {cost.seconds_per_step_alone:.3f} s" if cost.together > 1 else ""
    each = f"{cost.seconds_per_step:.3f} s per step and candidate{alone}"
    lines.append(("together", f"{cost.together} in a pass: {each}"))
    whole = " for all of these candidates" if cost.goes_on or cost.purse else " in all"
    lines.append(("tokens", f"about {cost.tokens:,} response tokens{whole}"))
    lines.append(("memory", f"about {cost.memory / 2**20:,.0f} MiB for {cost.together} together, beside the libraries"))
    evaluation = f"{duration(cost.seconds_per_evaluation)} per evaluation"
    lines.append(("time", f"about {duration(cost.seconds)}{whole} ({evaluation})"))
    if cost.purse is not None:
        lines += [("budget", cost.purse.said().removeprefix("budget: ")), ("", _paid(cost))]
    console.print(summary_table(lines))
    console.print("nothing was written")
    if cost.purse is not None and not begun(cost.fitting):
        raise refuse(cost.purse)


def _paid(cost: Estimate) -> str:
    """Which of the candidates the budget pays, and, where it does not pay all, what those take."""
    number = len(cost.fitting) if begun(cost.fitting) else 0  # what is not trained needs what is
    if len(cost.candidates) == 1:
        return "it pays the candidate" if number else "it does not pay the candidate"
    said = f"it pays {number} of these {len(cost.candidates)} candidates"
    if number in (0, len(cost.candidates)):
        return said
    return f"{said}: about {cost.tokens_paid:,} response tokens and {duration(cost.seconds_paid)}"

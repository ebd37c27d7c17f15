"""What a search may spend: tokens or minutes, what a candidate costs of them, and which of a proposal fit.

Tokens are those of the journal's outcomes, so that a resumed run decides as an unbroken one does. Minutes are this
machine's, as the journal has them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moalign.config import BudgetSettings
from moalign.engine.batches import RolloutSource
from moalign.sweeps import journal, together
from moalign.sweeps.candidate import batch_source
from moalign.sweeps.plan import Plan
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate, Outcome

COST, SPENT = "cost", "spent"  # events
SECONDS = 60.0  # in a minute


@dataclass(frozen=True)
class Purse:
    """``limit``, what was ``spent`` of it, and what a training of all steps costs; in tokens, or in minutes.

    ``trainings``: how many of these the whole limit pays, by the first estimate.
    """

    limit: float
    spent: float
    cost: float
    unit: str
    trainings: float

    @property
    def left(self) -> float:
        return max(0.0, self.limit - self.spent)

    @property
    def affordable(self) -> float:
        """Trainings of all steps that what is left pays."""
        return self.left / self.cost

    def said(self) -> str:
        """One line for people."""
        form = ",.0f" if self.unit == "tokens" else ",.1f"
        return (
            f"budget: {self.left:{form}} of {self.limit:{form}} {self.unit} left; a candidate of all steps takes about "
            f"{self.cost:{form}}"
        )


def purse(plan: Plan, directory: Path, workshop: Workshop, history: Sequence[Outcome]) -> Purse | None:
    """What there is to spend by now; None without a budget. What a candidate costs is measured once, and written into
    the journal."""
    budget = plan.config.search.budget
    if budget is None:
        return None
    events = journal.read(directory / journal.FILE)
    cost = next((event["cost"] for event in events if event["event"] == COST), None)
    if cost is None:
        cost = _measured(plan, workshop, budget)
        journal.append(directory / journal.FILE, {"event": COST, "cost": cost})
    trained = sum(_share(outcome.changes, plan) for outcome in history if outcome.kind == "trained" and outcome.tokens)
    if budget.tokens is not None:
        limit, spent, unit = float(budget.tokens), float(sum(outcome.tokens for outcome in history)), "tokens"
    else:
        assert budget.minutes is not None
        seconds = sum(event["seconds"] for event in events if event["event"] == SPENT)
        limit, spent, unit = budget.minutes, seconds / SECONDS, "minutes"
    return Purse(limit, spent, spent / trained if trained and spent else cost, unit, limit / cost)


def split(proposed: Sequence[Candidate], purse: Purse | None, plan: Plan) -> tuple[list[Candidate], list[Candidate]]:
    """Those that the budget pays, in their order, and those that it does not; what is not trained costs nothing."""
    if purse is None:
        return list(proposed), []
    kept: list[Candidate] = []
    left_out: list[Candidate] = []
    left = purse.left
    for candidate in proposed:
        price = purse.cost * _share(candidate.changes, plan) if candidate.kind == "trained" else 0.0
        (kept if price <= left else left_out).append(candidate)
        left -= price if price <= left else 0.0
    return kept, left_out


def spend(plan: Plan, directory: Path, began: float) -> None:
    """Note the time that a proposal took, where that is what is spent."""
    budget = plan.config.search.budget
    if budget is not None and budget.minutes is not None:
        journal.append(directory / journal.FILE, {"event": SPENT, "seconds": time.monotonic() - began})


def _share(changes: Mapping[str, Any], plan: Plan) -> float:
    """Of the configuration's steps, those that a candidate with these changes takes."""
    return plan.variant(changes).train.steps / plan.config.train.steps


def _measured(plan: Plan, workshop: Workshop, budget: BudgetSettings) -> float:
    """What a candidate of all steps costs, before one was trained."""
    first = next(candidate for candidate in plan.propose(()) if candidate.kind == "trained")
    source = batch_source(first, workshop)
    begin = time.monotonic()
    dataset, pairs = source.at(0)
    drawing = time.monotonic() - begin
    steps = plan.variant(first.changes).train.steps
    if budget.tokens is not None:
        rows = np.unique(dataset.pairs[pairs])
        return float(sum(len(dataset.sequences[row].response) for row in rows) * steps)
    begin = time.monotonic()
    workshop.evaluate(None)
    beside = time.monotonic() - begin
    if isinstance(source, RolloutSource):
        beside += drawing * source.settings.rounds
    return (together.seconds_per_candidate([first], workshop) * steps + beside) / SECONDS

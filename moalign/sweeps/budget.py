"""What a search may spend: tokens or minutes, what a candidate costs of them, and which of a proposal fit.

Tokens are those of the journal's outcomes, so that a resumed run decides as an unbroken one does. Minutes are this
machine's, as the journal has them. A proposal is cut by an estimate: of the data at first, then of what candidates have
cost. What is spent goes beyond the limit by no more than the estimate is wrong for one proposal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moalign.config import BudgetSettings
from moalign.data.dataset import PairDataset
from moalign.engine.batches import RolloutSource
from moalign.errors import ConfigError
from moalign.sweeps import journal, together
from moalign.sweeps.candidate import batch_source
from moalign.sweeps.plan import Plan
from moalign.sweeps.proposals import first_trained, next_candidates
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate, Outcome

COST, SPENT = "cost", "spent"  # events
SECONDS = 60.0  # in a minute
LOOKED_AT = 100  # steps at most whose tokens are counted beforehand

now = time.monotonic


@dataclass(frozen=True)
class Purse:
    """``limit``, what was ``spent`` of it, and what a training of all steps costs; in tokens, or in minutes.

    ``trainings``: how many of these the whole limit pays, by the first estimate.
    ``beside``: of that cost, what the number of steps does not change and candidates that are not trained cost as well.
    """

    limit: float
    spent: float
    cost: float
    unit: str
    trainings: float
    beside: float = 0.0

    @property
    def left(self) -> float:
        return max(0.0, self.limit - self.spent)

    @property
    def affordable(self) -> float:
        """Trainings of all steps that what is left pays."""
        return self.left / self.cost if self.cost else math.inf

    def price(self, candidate: Candidate, plan: Plan) -> float:
        """What this candidate is expected to cost."""
        share = _share(candidate.changes, plan) if candidate.kind == "trained" else 0.0
        return self.beside + (self.cost - self.beside) * share

    def said(self) -> str:
        """One line for people."""
        left, limit, cost = (self.amount(value) for value in (self.left, self.limit, self.cost))
        return f"budget: {left} of {limit} {self.unit} left; a training takes about {cost}"

    def amount(self, value: float) -> str:
        """So many of the unit, in digits."""
        return f"{value:,.0f}" if self.unit == "tokens" else f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def untouched(plan: Plan, workshop: Workshop) -> Purse | None:
    """What there is to spend before anything is; None without a budget."""
    budget = plan.config.search.budget
    if budget is None:
        return None
    cost, beside = _measured(plan, workshop, budget)
    if budget.tokens is not None:
        return Purse(budget.tokens, 0.0, cost, "tokens", budget.tokens / cost)
    assert budget.minutes is not None
    return Purse(budget.minutes, 0.0, cost, "minutes", budget.minutes / cost, beside)


def purse(plan: Plan, directory: Path, workshop: Workshop, history: Sequence[Outcome]) -> Purse | None:
    """What there is to spend by now; None without a budget. What a candidate costs is measured once, and written into
    the journal."""
    budget = plan.config.search.budget
    if budget is None:
        return None
    events = journal.read(directory / journal.FILE)
    found = next((event for event in events if event["event"] == COST), None)
    if found is None:
        cost, beside = _measured(plan, workshop, budget)
        journal.append(directory / journal.FILE, {"event": COST, "cost": cost, "beside": beside})
    else:
        cost, beside = found["cost"], found.get("beside", 0.0)
    if budget.tokens is not None:
        return _of_tokens(budget.tokens, cost, history, plan)
    assert budget.minutes is not None
    spent = sum(event["seconds"] for event in events if event["event"] == SPENT) / SECONDS
    return _of_minutes(budget.minutes, cost, beside, spent, history, plan)


def _of_tokens(limit: float, cost: float, history: Sequence[Outcome], plan: Plan) -> Purse:
    """Tokens of failed candidates are spent as well, but tell nothing of what a whole training costs. Nobody has those
    of a pass of several that was begun anew with fewer."""
    spent = float(sum(outcome.tokens for outcome in history))
    whole = [each for each in history if each.kind == "trained" and each.status == "done" and each.tokens]
    trained = sum(_share(outcome.changes, plan) for outcome in whole)
    now_known = sum(outcome.tokens for outcome in whole) / trained if trained else cost
    return Purse(limit, spent, now_known, "tokens", limit / cost)


def _of_minutes(
    limit: float, cost: float, beside: float, spent: float, history: Sequence[Outcome], plan: Plan
) -> Purse:
    """Nothing tells how much of the time spent was a failed candidate's: it counts as a whole training. Where all have
    failed, the first estimate stands."""
    done = [outcome for outcome in history if outcome.status == "done"]
    now_known = cost
    if begun(done) and spent:
        ended = [outcome for outcome in history if outcome.kind == "trained" and outcome.status != "skipped"]
        trained = sum(_share(outcome.changes, plan) for outcome in ended)
        now_known = beside + max(0.0, spent - len(done) * beside) / trained
    return Purse(limit, spent, now_known, "minutes", limit / cost, beside)


def split(proposed: Sequence[Candidate], purse: Purse | None, plan: Plan) -> tuple[list[Candidate], list[Candidate]]:
    """Those that the budget pays, in their order, and those that it does not; what is not trained costs no tokens."""
    if purse is None:
        return list(proposed), []
    kept: list[Candidate] = []
    left_out: list[Candidate] = []
    left = purse.left
    for candidate in proposed:
        price = purse.price(candidate, plan)
        (kept if price <= left else left_out).append(candidate)
        left -= price if price <= left else 0.0
    return kept, left_out


def refuse(purse: Purse) -> ConfigError:
    """Where not one candidate could be trained."""
    limit, cost = purse.amount(purse.limit), purse.amount(purse.cost)
    return ConfigError(
        f"search.budget.{purse.unit}: {limit} {purse.unit} do not pay a single candidate that the search proposes; one "
        f"of all steps takes about {cost}. Give more, or take fewer train.steps, in another run (--out)"
    )


def begun(candidates: Sequence[Candidate | Outcome]) -> bool:
    """Whether any of them is trained, or was to be."""
    return any(one.kind == "trained" and getattr(one, "status", "") != "skipped" for one in candidates)


def in_vain(events: Sequence[Mapping[str, Any]]) -> int:
    """How many proposals, the last ones in a row, held nothing that the budget paid."""
    number = 0
    for event in reversed([event for event in events if event["event"] == "proposed"]):
        if event["candidates"]:
            break
        number += 1
    return number


def spend(plan: Plan, directory: Path, began: float) -> float:
    """Note the time since then, where that is what is spent, and return the time."""
    budget, ended = plan.config.search.budget, now()
    if budget is not None and budget.minutes is not None:
        journal.append(directory / journal.FILE, {"event": SPENT, "seconds": ended - began})
    return ended


def _share(changes: Mapping[str, Any], plan: Plan) -> float:
    """What a candidate with these changes trains on, as a share of what the configuration says."""
    train, configured = plan.variant(changes).train, plan.config.train
    steps = train.steps / configured.steps
    return steps if plan.config.rollouts else steps * train.pairs_per_step / configured.pairs_per_step


def _measured(plan: Plan, workshop: Workshop, budget: BudgetSettings) -> tuple[float, float]:
    """What a candidate of all steps costs before one was trained, and what of that has nothing to do with steps."""
    proposed = next_candidates(plan, workshop, ())  # the first one needs no other's adapter
    first = replace(first_trained(proposed, plan), changes={})
    source, steps = batch_source(first, workshop), plan.config.train.steps
    begin = now()
    source.at(0)
    drawing = now() - begin
    if budget.tokens is not None:
        last = -(-steps // source.settings.rounds) if isinstance(source, RolloutSource) else steps  # before round 2
        looked_at = range(0, last, -(-last // LOOKED_AT))
        return sum(_tokens(*source.at(step)) for step in looked_at) / len(looked_at) * steps, 0.0
    begin = now()
    workshop.evaluate(None)
    beside = now() - begin
    if isinstance(source, RolloutSource):
        beside += drawing * source.settings.rounds
    return (together.seconds_per_candidate([first], workshop) * steps + beside) / SECONDS, beside / SECONDS


def _tokens(dataset: PairDataset, pairs: NDArray[np.int64]) -> int:
    """Response tokens of a step on these pairs."""
    return sum(len(dataset.sequences[row].response) for row in np.unique(dataset.rows_of(pairs)))

"""What a search is told by now: the configuration's space, and what the run has measured since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moalign.sweeps import journal
from moalign.sweeps.budget import Purse
from moalign.sweeps.plan import Plan
from moalign.types import Space


def space(plan: Plan, directory: Path, purse: Purse | None) -> Space:
    """A function of the journal, so that a resumed run asks its search what an unbroken one does."""
    events = journal.read(directory / journal.FILE)
    base: dict[str, float] = next((event["scores"] for event in events if event["event"] == "base"), {})
    return replace(
        paid(plan.space, purse),
        together=_together(events, plan.space.together),
        base=dict(base),
        reference_point=plan.space.reference_point or dict(base),
        kl_price=plan.kl_price,
    )


def paid(space: Space, purse: Purse | None) -> Space:
    """With what the budget pays."""
    return space if purse is None else replace(space, affordable=purse.affordable, budget=purse.trainings)


def _together(events: Sequence[dict[str, Any]], configured: int) -> int:
    """As many as were found fastest; where those were all that there were, twice as many may be as fast."""
    found = [event for event in events if event["event"] == "together"]
    if not found:
        return configured
    size, of = found[-1]["size"], found[-1].get("of")
    return size if of is None or size < of else 2 * size

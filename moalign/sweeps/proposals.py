"""The next candidates of a run: what its search proposes, and what that needs besides."""

from __future__ import annotations

from collections.abc import Sequence

from moalign import preference
from moalign.errors import PluginError
from moalign.sweeps import anchors
from moalign.sweeps.plan import Plan
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate, Outcome, Space


def next_candidates(
    plan: Plan, workshop: Workshop, history: Sequence[Outcome], space: Space | None = None
) -> list[Candidate]:
    """The search's next candidates, the one-hot ones first where others need their adapters as rewards."""
    proposed = plan.propose(history, space)
    implicit = workshop.implicit(proposed)
    if not implicit:
        return proposed
    added = anchors.missing(implicit, [*history, *proposed], plan)
    return added + sorted(proposed, key=lambda candidate: not preference.is_one_hot(candidate.preference))


def first_trained(candidates: Sequence[Candidate], plan: Plan) -> Candidate:
    """What is measured beforehand. Raises PluginError where none of a first proposal is trained."""
    for candidate in candidates:
        if candidate.kind == "trained":
            return candidate  # one that needs no other's adapter
    name = plan.config.search.name
    raise PluginError(
        f"search '{name}': nothing in its first proposal ({', '.join(each.id for each in candidates) or 'none'}) is "
        "trained, so that what a training costs cannot be measured; it must begin with a candidate that is trained"
    )

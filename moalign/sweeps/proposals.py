"""The next candidates of a run: what its search proposes, and what that needs besides."""

from __future__ import annotations

from collections.abc import Sequence

from moalign import preference
from moalign.errors import PluginError
from moalign.sweeps.plan import Plan
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate, Outcome, Preference, Space


def next_candidates(
    plan: Plan, workshop: Workshop, history: Sequence[Outcome], space: Space | None = None
) -> list[Candidate]:
    """The search's next candidates, the one-hot ones first where others need their adapters as rewards."""
    proposed = plan.propose(history, space)
    implicit = workshop.implicit(proposed)
    if not implicit:
        return proposed
    known = [(one.id, one.preference) for one in history] + [(one.id, one.preference) for one in proposed]
    one_hot = [preferred.values for _, preferred in known if preference.is_one_hot(preferred)]
    alone = {objective for values in one_hot for objective, value in values.items() if value}
    taken = {identity for identity, _ in known}
    anchors = [_alone(name, plan.objectives, taken) for name in implicit if name not in alone]
    return anchors + sorted(proposed, key=lambda candidate: not preference.is_one_hot(candidate.preference))


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


def _alone(name: str, objectives: Sequence[str], taken: set[str]) -> Candidate:
    """The candidate for one objective alone, under an id that nobody has."""
    identity = f"only-{name}"
    while identity in taken:
        identity += "-anchor"
    return Candidate(identity, Preference("weights", {other: float(other == name) for other in objectives}, name))

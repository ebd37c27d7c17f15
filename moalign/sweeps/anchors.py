"""Anchors: adapters trained for one objective alone, whose log-ratios are its reward where nothing else gives one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count

from moalign import lora, preference
from moalign.engine.trainee import FrozenReward
from moalign.errors import MoalignError, TrainingError
from moalign.sweeps.plan import Plan
from moalign.sweeps.workshop import Workshop
from moalign.types import Candidate, Outcome, Preference


def is_anchor(one: Candidate | Outcome, name: str, plan: Plan) -> bool:
    """Whether this is trained for the objective alone, and for as many steps as the configuration says.

    A search may begin with few steps; an adapter that has hardly moved from the base has next to no reward to give.
    """
    alone = preference.is_one_hot(one.preference) and one.preference.values.get(name, 0.0) > 0.0
    steps = plan.config.train.steps
    return alone and one.kind == "trained" and one.changes.get("train.steps", steps) >= steps


def missing(names: Sequence[str], known: Sequence[Candidate | Outcome], plan: Plan) -> list[Candidate]:
    """Candidates for each of these objectives that none of the known is an anchor of, under ids that nobody has."""
    taken, made = {one.id for one in known}, []
    for name in names:
        if not any(is_anchor(one, name, plan) for one in known):
            identity = f"only-{name}"
            while identity in taken:
                identity += "-anchor"
            alone = {other: float(other == name) for other in plan.objectives}
            made.append(Candidate(identity, Preference("weights", alone, name)))
    return made


def reward(name: str, candidate: Candidate, workshop: Workshop, history: Sequence[Outcome]) -> FrozenReward:
    """What stands in for the objective's reward in the training of this candidate, loaded into a slot of its own.

    The first anchor that was trained with the candidate's own changes, else the first of all: what a search tries is
    worth what it would reach if it were the configuration. Raises TrainingError where there is none.
    """
    plan = workshop.plan
    done = [outcome for outcome in history if outcome.status == "done" and is_anchor(outcome, name, plan)]
    if not done:
        raise TrainingError(
            f"the candidate for {name} alone, whose adapter is the reward of {name}, has failed or is missing"
        )
    chosen = next((outcome for outcome in done if _changes(outcome) == _changes(candidate)), done[0])
    if chosen.id not in workshop.slots:
        workshop.slots[chosen.id] = _loaded(chosen.id, workshop)
    return FrozenReward(workshop.slots[chosen.id], chosen.checksum or chosen.id, plan.variant(chosen.changes).beta)


def release(workshop: Workshop, history: Sequence[Outcome]) -> None:
    """Let go of the anchors that were trained with changes; those of the configuration itself serve all."""
    for outcome in history:
        if outcome.changes and outcome.id in workshop.slots:
            workshop.model.policy.delete_adapter(workshop.slots.pop(outcome.id))


def _changes(one: Candidate | Outcome) -> str:
    """As the journal has them."""
    return json.dumps(dict(one.changes), sort_keys=True)


def _loaded(candidate: str, workshop: Workshop) -> str:
    """The slot into which this one's adapter was read."""
    policy, taken = workshop.model.policy, set(workshop.slots.values())
    slot = next(name for name in map("frozen{}".format, count()) if name not in taken)
    lora.add_slots(policy, [slot])
    try:
        lora.read(policy, slot, workshop.directory / "candidates" / candidate, workshop.model.fingerprint)
    except MoalignError:
        policy.delete_adapter(slot)
        raise
    return slot

"""Searches where one model is trained and only asked: they see their own candidates, end, or say so at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sweeps import small_config, write_pairs

from moalign import registry
from moalign.errors import ConfigError
from moalign.sweeps import conditions
from moalign.sweeps.plan import prepare
from moalign.types import Outcome

REFUSED = {
    "layer-averaging": {},
    "evolution": {"vary": "mixes", "population": 4},
    "c-morl": {},
    "epsilon-constraint": {},
    "successive-halving": {},
    "hyper-parameters": {"space": {"loss.beta": {"low": 0.1, "high": 0.2}}},
}
ASKED = {
    "grid": ({"points": 7, "warm_start": "neighbour"}, 7),
    "riesz": ({"points": 5}, 5),
    "sobol": ({"count": 5}, 5),
    "random": ({"count": 5}, 5),
    "soup": ({"trained": 2, "points": 5}, 5),
    "optimistic-linear-support": ({"points": 4, "mixes": 2, "tolerance": 0.0}, 6),
    "evolution": ({"population": 4, "generations": 2}, 8),
    "auto": ({"points": 5}, 5),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def plan_for(tiny_model_path, pairs):
    def plan(search, **options):
        config = small_config(tiny_model_path, pairs, condition="soup", search={"name": search, **options})
        return prepare(config, registry.discover())

    return plan


@pytest.mark.parametrize("search", REFUSED)
def test_those_that_train_or_mix_are_refused_before_anything_is_trained(plan_for, search):
    with pytest.raises(ConfigError, match=f"search: '{search}' .*one model is trained and only asked"):
        plan_for(search, **REFUSED[search])


@pytest.mark.parametrize("search", ASKED)
def test_the_others_ask_so_often_and_end(plan_for, search):
    options, most = ASKED[search]
    plan = plan_for(search, **options)
    space, history = replace(plan.space, base=dict.fromkeys(plan.objectives, 0.0)), []
    while proposed := plan.propose(history, space):
        for candidate in proposed:
            x, y = candidate.preference.vector(plan.objectives)
            length = (x**2 + y**2) ** 0.5
            scores = dict(zip(plan.objectives, (x / length, y / length), strict=True))
            history.append(Outcome(candidate.id, "done", candidate.preference, scores, kind=candidate.kind))
        assert len(history) <= most + 1
    first, *asked = history
    assert first.id == conditions.MODEL and all(outcome.kind == "conditioned" for outcome in asked)
    assert len(asked) == most, "the model itself is none of the search's own"


def test_what_a_search_sees_of_the_history_is_its_own(plan_for):
    plan = plan_for("grid", points=3)
    model, *asked = plan.propose(())
    history = [Outcome(each.id, "done", each.preference, kind=each.kind) for each in (model, *asked)]
    assert [outcome.id for outcome in conditions.seen(history, plan)] == [each.id for each in asked]
    alone = replace(plan, conditioner=None)
    assert conditions.seen(history, alone) == tuple(history), "without `condition` a candidate may have that name"
